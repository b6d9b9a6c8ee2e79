//! Weights of linear layers as compressed-tensors lays them out, with the configuration that its readers look for.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use passes::encoding::Encoding;
use passes::grid::block::BlockFormat;
use passes::id::{Site, ValueId};
use passes::model::Model;
use passes::ops;
use passes::trt::e8m0;
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::matrix::{Layout, Matrix, words};

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
    /// Format name, the arguments of weights and those of activations, of every layer.
    schemes: BTreeMap<[String; 3], Vec<String>>,
    /// Products whose weights stay in float.
    ignored: Vec<String>,
}

impl Compressed {
    /// The layers of `model`; fails for a weight that the format has no layout for.
    pub(super) fn of(model: &Model) -> Result<Self, String> {
        let graph = model.graph();
        let mut compressed = Self::default();
        let mut taken: BTreeMap<String, (ValueId, Option<Encoding>)> = BTreeMap::new();
        for (id, node) in graph.nodes().filter(|(_, node)| node.op.is("MatMul") || node.op.is("Gemm")) {
            let Some(roles) = ops::linear(graph, id).filter(|roles| roles.weight == 1) else { continue };
            let Some(value) = node.input(1) else { continue };
            let name = graph.value(value).name.to_string();
            // `split-gemm` turns weights, and what is written here is turned back.
            let given = name.strip_suffix(passes::normalize::TRANSPOSED).unwrap_or(&name);
            let module = given.strip_suffix(".weight").unwrap_or(given).to_owned();
            let site = Site::Use { node: id, input: roles.weight };
            let (Some(encoding), Some(codes)) = (model.plan().encoding(site), model.plan().codes(site)) else {
                compressed.ignored.push(module);
                continue;
            };
            let activation = model.plan().encoding_of_use(graph, id, roles.activation);
            if let Some((other, read)) = taken.get(&module) {
                if *other != value || read.as_ref() != activation {
                    return Err(format!(
                        "tensor `{name}`: two layers would be called `{module}`, or one of two inputs"
                    ));
                }
            } else {
                taken.insert(module.clone(), (value, activation.cloned()));
                let matrix = Matrix::of(encoding, codes, roles.out_axis);
                let added = matrix.and_then(|matrix| compressed.add(&module, &matrix, activation));
                added.map_err(|problem| format!("tensor `{name}`: {problem}"))?;
            }
        }
        compressed.entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(compressed)
    }

    /// The tensors of `module`, and what reads them must know.
    fn add(&mut self, module: &str, matrix: &Matrix<'_>, activation: Option<&Encoding>) -> Result<(), String> {
        let layout = Layout::of(matrix, activation)?;
        let mut entry = |suffix: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>| {
            self.entries.push(Entry { name: format!("{module}.{suffix}"), dtype, shape: shape.to_vec(), bytes });
        };
        let (rows, columns, groups) = (matrix.rows, matrix.columns, matrix.groups());
        let bits = matrix.encoding.grid.info().bits;
        match layout {
            Layout::PackQuantized => {
                let offset = matrix.offset();
                let packed = |row: usize| words((0..columns).map(|column| matrix.code(row, column) + offset), bits);
                let bytes: Vec<u8> = (0..rows).flat_map(packed).flat_map(u32::to_le_bytes).collect();
                entry("weight_packed", Dtype::I32, &[rows, (columns * bits as usize).div_ceil(32)], bytes);
                let shape = [rows, columns].map(|n| i64::try_from(n).unwrap_or(i64::MAX).to_le_bytes()).concat();
                entry("weight_shape", Dtype::I64, &[2], shape);
                if !matrix.encoding.is_symmetric() {
                    let column = |group: usize| words((0..rows).map(|row| matrix.zero(row, group) + offset), bits);
                    let columns: Vec<Vec<u32>> = (0..groups).map(column).collect();
                    let tall = (rows * bits as usize).div_ceil(32);
                    let bytes = (0..tall).flat_map(|at| columns.iter().flat_map(move |c| c[at].to_le_bytes()));
                    entry("weight_zero_point", Dtype::I32, &[tall, groups], bytes.collect());
                }
            }
            Layout::IntQuantized => entry("weight", Dtype::I8, &[rows, columns], matrix.bytes()),
            Layout::FloatQuantized | Layout::NaiveQuantized | Layout::Mxfp8 => {
                entry("weight", Dtype::F8_E4M3, &[rows, columns], matrix.bytes());
            }
            Layout::Nvfp4 | Layout::Mxfp4 => {
                let pair = |pair: &[u8]| pair[0] | pair[1] << 4;
                let bytes = matrix.bytes().chunks_exact(2).map(pair).collect();
                entry("weight_packed", Dtype::U8, &[rows, columns / 2], bytes);
            }
        }
        let scales = matrix.scales();
        match layout {
            Layout::Mxfp4 | Layout::Mxfp8 => {
                let codes = e8m0(&scales).ok_or("a scale is no power of two")?;
                entry("weight_scale", Dtype::U8, &[rows, groups], codes);
            }
            Layout::Nvfp4 => {
                let (factor, codes) = BlockFormat::factored(&scales, matrix.top())
                    .ok_or("its scales are no FLOAT8E4M3FN of one factor")?;
                entry("weight_scale", Dtype::F8_E4M3, &[rows, groups], codes);
                // What it divides by is what others multiply with.
                entry("weight_global_scale", Dtype::F32, &[1], (1.0 / factor).to_le_bytes().to_vec());
            }
            _ => {
                let bytes = scales.into_iter().flat_map(f32::to_le_bytes).collect();
                entry("weight_scale", Dtype::F32, &[rows, groups], bytes);
            }
        }
        if let Some(activation) = activation {
            entry("input_scale", Dtype::F32, &[1], activation.scale[0].to_le_bytes().to_vec());
        }
        self.schemes.entry(layout.scheme(matrix, activation)).or_default().push(module.to_owned());
        Ok(())
    }

    /// Writes the weights to `path`.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let views = self.entries.iter().map(|entry| (entry.name.as_str(), entry));
        safetensors::serialize_to_file(views, None, path).map_err(io::Error::other)
    }

    /// The `config.json` with nothing but the quantization: the base model's own is the user's.
    pub(super) fn config(&self) -> Value {
        let many = self.schemes.len() > 1;
        let group = |([format, weights, activations], modules): (&[String; 3], &Vec<String>)| {
            // Names tell layers of one class apart.
            let targets = if many { json!(modules) } else { json!(["Linear"]) };
            let [weights, activations] =
                [weights, activations].map(|text| serde_json::from_str::<Value>(text).unwrap_or_default());
            json!({ "targets": targets, "weights": weights, "input_activations": activations,
                "output_activations": null, "format": format })
        };
        let groups: serde_json::Map<String, Value> =
            self.schemes.iter().enumerate().map(|(at, scheme)| (format!("group_{at}"), group(scheme))).collect();
        let format = match self.schemes.keys().map(|[format, ..]| format.as_str()).collect::<BTreeSet<_>>().len() {
            1 => self.schemes.keys().next().map_or("dense", |[format, ..]| format.as_str()),
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
