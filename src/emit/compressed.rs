//! Weights of linear layers as compressed-tensors lays them out, with the configuration that its readers look for.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use passes::encoding::{self, Encoding, Granularity};
use passes::id::Site;
use passes::model::Model;
use passes::ops;
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// The name of the file that holds the weights.
pub(super) const FILE: &str = "model.safetensors";

/// One tensor of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Entry {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The linear layers of a model as entries, and what its configuration says about them.
#[derive(Debug, Default)]
pub(super) struct Compressed {
    entries: Vec<Entry>,
    /// Format name and the arguments of weights, of every layer.
    schemes: BTreeSet<(String, String)>,
    modules: Vec<String>,
    /// Products whose weights stay in float.
    ignored: Vec<String>,
}

impl Compressed {
    /// The layers of `model`; fails for a weight that the format has no layout for.
    pub(super) fn of(model: &Model) -> Result<Self, String> {
        let graph = model.graph();
        let mut compressed = Self::default();
        let mut taken = BTreeSet::new();
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("MatMul") || node.op.is("Gemm")) {
            let Some(roles) = ops::linear(graph, id).filter(|roles| roles.weight == 1) else { continue };
            let Some(value) = node.input(1) else { continue };
            let name = graph.value(value).name.to_string();
            let module = name.strip_suffix(".weight").unwrap_or(&name).to_owned();
            let site = Site::Use { node: id, input: roles.weight };
            let (Some(encoding), Some(codes)) = (model.plan().encoding(site), model.plan().codes(site)) else {
                compressed.ignored.push(module);
                continue;
            };
            if taken.insert(module.clone()) {
                let matrix = Matrix::of(encoding, codes, roles.out_axis);
                compressed.add(&module, &matrix.map_err(|problem| format!("tensor `{name}`: {problem}"))?);
            }
        }
        compressed.entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(compressed)
    }

    fn add(&mut self, module: &str, matrix: &Matrix<'_>) {
        let mut entry = |suffix: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>| {
            self.entries.push(Entry { name: format!("{module}.{suffix}"), dtype, shape: shape.to_vec(), bytes });
        };
        let (rows, columns, groups) = (matrix.rows, matrix.columns, matrix.groups());
        let scales = matrix.scales().into_iter().flat_map(f32::to_le_bytes).collect();
        let info = matrix.encoding.grid.info();
        let format = if info.integer {
            let offset = matrix.offset();
            let packed = |row: usize| words((0..columns).map(|column| matrix.code(row, column) + offset), info.bits);
            let bytes: Vec<u8> = (0..rows).flat_map(packed).flat_map(u32::to_le_bytes).collect();
            entry("weight_packed", Dtype::I32, &[rows, (columns * info.bits as usize).div_ceil(32)], bytes);
            let shape = [rows, columns].map(|n| i64::try_from(n).unwrap_or(i64::MAX).to_le_bytes()).concat();
            entry("weight_shape", Dtype::I64, &[2], shape);
            if !matrix.encoding.is_symmetric() {
                let column = |group: usize| words((0..rows).map(|row| matrix.zero(row, group) + offset), info.bits);
                let columns: Vec<Vec<u32>> = (0..groups).map(column).collect();
                let tall = (rows * info.bits as usize).div_ceil(32);
                let bytes = (0..tall).flat_map(|at| columns.iter().flat_map(move |c| c[at].to_le_bytes())).collect();
                entry("weight_zero_point", Dtype::I32, &[tall, groups], bytes);
            }
            "pack-quantized"
        } else {
            let places = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
            let bytes = places.map(|(row, column)| u8::try_from(matrix.code(row, column)).unwrap_or(0)).collect();
            entry("weight", Dtype::F8_E4M3, &[rows, columns], bytes);
            "float-quantized"
        };
        entry("weight_scale", Dtype::F32, &[rows, groups], scales);
        let weights = json!({
            "num_bits": info.bits,
            "type": if info.integer { "int" } else { "float" },
            "symmetric": matrix.encoding.is_symmetric(),
            "strategy": if matrix.block().is_some() { "group" } else { "channel" },
            "group_size": matrix.block(),
            "dynamic": false,
        });
        self.schemes.insert((format.to_owned(), weights.to_string()));
        self.modules.push(module.to_owned());
    }

    /// Writes the weights to `path`.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let views = self.entries.iter().map(|entry| (entry.name.as_str(), entry));
        safetensors::serialize_to_file(views, None, path).map_err(io::Error::other)
    }

    /// The `config.json` with nothing but the quantization: the base model's own is the user's.
    pub(super) fn config(&self) -> Value {
        let group = |(format, weights): &(String, String)| {
            let weights: Value = serde_json::from_str(weights).unwrap_or_default();
            json!({ "targets": ["Linear"], "weights": weights, "input_activations": null, "output_activations": null, "format": format })
        };
        let groups: serde_json::Map<String, Value> =
            self.schemes.iter().enumerate().map(|(at, scheme)| (format!("group_{at}"), group(scheme))).collect();
        let format = match self.schemes.iter().map(|(format, _)| format.as_str()).collect::<BTreeSet<_>>().len() {
            1 => self.schemes.first().map_or("dense", |(format, _)| format.as_str()),
            _ => "mixed-precision",
        };
        json!({ "quantization_config": {
            "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
            "config_groups": groups, "ignore": self.ignored, "kv_cache_scheme": null,
        } })
    }
}

/// Whether the file at `path` holds what the plan of `model` says, read back and compared byte by byte.
pub(crate) fn check(path: &Path, model: &Model) -> Result<(), String> {
    let wanted = Compressed::of(model)?;
    let bytes = crate::load::map(path).map_err(|e| e.to_string())?;
    let read = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
    for entry in &wanted.entries {
        let found = read.tensor(&entry.name).map_err(|e| format!("{}: {e}", entry.name))?;
        if found.dtype() != entry.dtype || found.shape() != entry.shape || found.data() != entry.bytes {
            return Err(format!("{} is not what was planned", entry.name));
        }
    }
    if read.len() == wanted.entries.len() { Ok(()) } else { Err("it holds other tensors".into()) }
}

/// The codes of a weight as [outputs, inputs].
struct Matrix<'a> {
    encoding: &'a Encoding,
    codes: Vec<i64>,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl<'a> Matrix<'a> {
    #[expect(clippy::cast_possible_truncation, reason = "codes of up to 8 bits")]
    fn of(encoding: &'a Encoding, codes: &passes::tensor::Tensor, out_axis: usize) -> Result<Self, String> {
        let [first, second] = *codes.shape() else { return Err("it is no matrix".into()) };
        let info = encoding.grid.info();
        let by_rows = match encoding.granularity {
            Granularity::Axis(axis) => axis == out_axis,
            Granularity::Block { axis, size } => axis != out_axis && codes.shape()[axis].is_multiple_of(size),
            Granularity::Tensor => true,
            Granularity::Dynamic => false,
        };
        if !by_rows || info.bits > 8 || !(info.integer || info.about.name == "float8e4m3fn") {
            return Err(format!("compressed-tensors has no layout for {} with these scales", info.about.name));
        }
        let unpacked = encoding::unpack(codes);
        let number = |code: u32| if info.integer { encoding.grid.decode(code) as i64 } else { i64::from(code) };
        let (rows, columns) = if out_axis == 0 { (first, second) } else { (second, first) };
        Ok(Self {
            encoding,
            codes: unpacked.into_iter().map(number).collect(),
            rows,
            columns,
            transposed: out_axis != 0,
        })
    }

    fn code(&self, row: usize, column: usize) -> i64 {
        self.codes[if self.transposed { column * self.rows + row } else { row * self.columns + column }]
    }

    fn block(&self) -> Option<usize> {
        match self.encoding.granularity {
            Granularity::Block { size, .. } if size < self.columns => Some(size),
            _ => None,
        }
    }

    fn groups(&self) -> usize {
        self.block().map_or(1, |size| self.columns.div_ceil(size))
    }

    /// Where the scale of a row's group lies.
    fn group(&self, row: usize, group: usize) -> usize {
        match self.encoding.granularity {
            Granularity::Tensor | Granularity::Dynamic => 0,
            Granularity::Axis(_) => row,
            Granularity::Block { .. } if self.transposed => group * self.rows + row,
            Granularity::Block { .. } => row * self.groups() + group,
        }
    }

    fn scales(&self) -> Vec<f32> {
        let places = (0..self.rows).flat_map(|row| (0..self.groups()).map(move |group| (row, group)));
        places.map(|(row, group)| self.encoding.scale[self.group(row, group)]).collect()
    }

    fn zero(&self, row: usize, group: usize) -> i64 {
        i64::from(self.encoding.zero_point[self.group(row, group)])
    }

    /// What makes signed codes unsigned.
    fn offset(&self) -> i64 {
        if self.encoding.grid.range().0 < 0.0 { 1 << (self.encoding.grid.info().bits - 1) } else { 0 }
    }
}

/// `codes` of `bits` each as 32-bit words, the first in the lowest bits.
fn words(codes: impl Iterator<Item = i64>, bits: u32) -> Vec<u32> {
    let (mut words, mut held, mut filled) = (Vec::new(), 0_u64, 0);
    for code in codes {
        held |= (code.cast_unsigned() & ((1 << bits) - 1)) << filled;
        filled += bits;
        if filled >= 32 {
            words.push(u32::try_from(held & u64::from(u32::MAX)).unwrap_or(0));
            held >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        words.push(u32::try_from(held).unwrap_or(0));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_filled_from_the_low_end_and_across_their_borders() {
        assert_eq!(words([1, 2, 3, 4, 5, 6, 7, 8, 9].into_iter(), 4), [0x8765_4321, 9]);
        // Eleven codes of 3 bits: the eleventh straddles.
        assert_eq!(words(std::iter::repeat_n(7, 11), 3), [u32::MAX, 1]);
    }
}
