//! `.npz`, `.npy`, `.pb` and `.safetensors`.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

use npyz::npz::NpzArchive;
use npyz::{DType as NpyType, NpyFile, Order, TypeChar};
use passes::tensor::{DType, Tensor};
use safetensors::{Dtype, SafeTensors};

use super::Slot;

/// The most bytes one array of a sample file may have.
const MAX_BYTES: u64 = 8 << 30;
/// `NumPy`'s own limit for headers.
const MAX_HEADER: u64 = 10_000;

/// The tensors in the file at `path`, named. A file of one unnamed tensor takes the name of the only input.
pub(super) fn read(path: &Path, slots: &[Slot]) -> Result<Vec<(String, Tensor)>, String> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "npz" => read_npz(path),
        "npy" => {
            let mut file = open(path)?;
            check_npy_header(&mut file)?;
            file.rewind().map_err(text)?;
            Ok(vec![(only(slots)?, read_npy(BufReader::new(file))?)])
        }
        "safetensors" => read_safetensors(path),
        _ => Ok(vec![(only(slots)?, read_pb(path)?)]),
    }
}

/// `input_0.pb`, `input_1.pb`, … in the order of the model's inputs.
pub(super) fn read_pb_folder(folder: &Path, slots: &[Slot]) -> Result<Vec<(String, Tensor)>, String> {
    let at = |(index, slot): (usize, &Slot)| {
        let tensor =
            read_pb(&folder.join(format!("input_{index}.pb"))).map_err(|e| format!("input_{index}.pb: {e}"))?;
        Ok((slot.name.clone(), tensor))
    };
    slots.iter().enumerate().map(at).collect()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|e| format!("cannot be opened: {e}"))
}

fn only(slots: &[Slot]) -> Result<String, String> {
    match slots {
        [one] => Ok(one.name.clone()),
        many => Err(format!("it holds one unnamed tensor, and the model takes {}: use .npz", many.len())),
    }
}

fn read_npz(path: &Path) -> Result<Vec<(String, Tensor)>, String> {
    let mut archive = NpzArchive::new(BufReader::new(open(path)?)).map_err(text)?;
    let mut names: Vec<String> = archive.array_names().map(str::to_owned).collect();
    names.sort_unstable();
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let entry = format!("{name}.npy");
        let stored = archive.zip_archive().by_name(&entry).map_err(text)?;
        if stored.size() > MAX_BYTES || stored.size() / 1000 > stored.compressed_size().max(1) {
            return Err(format!("array `{name}` unpacks to {} bytes: refused", stored.size()));
        }
        drop(stored);
        check_npy_header(&mut archive.zip_archive().by_name(&entry).map_err(text)?)?;
        let Some(file) = archive.by_name(&name).map_err(text)? else { continue };
        let header = file.header().clone();
        let file = NpyFile::with_header(header, BufReader::with_capacity(1 << 20, file.into_inner()));
        tensors.push((name.clone(), typed(file).map_err(|e| format!("array `{name}`: {e}"))?));
    }
    Ok(tensors)
}

/// Refuses what the reader would trust: a header of gigabytes or of endless brackets.
fn check_npy_header(reader: &mut impl Read) -> Result<(), String> {
    let mut start = [0; 12];
    reader.read_exact(&mut start).map_err(|_| "it is too short for a NumPy array".to_owned())?;
    if &start[..6] != b"\x93NUMPY" {
        return Err("it is no NumPy array".into());
    }
    let (length, rest) = match start[6] {
        1 => (u64::from(u16::from_le_bytes([start[8], start[9]])), 2),
        _ => (u64::from(u32::from_le_bytes([start[8], start[9], start[10], start[11]])), 0),
    };
    if length > MAX_HEADER {
        return Err(format!("its header has {length} bytes: refused"));
    }
    let mut header = Vec::new();
    reader.take(length.saturating_sub(rest)).read_to_end(&mut header).map_err(text)?;
    let nesting = header.iter().filter(|b| matches!(b, b'(' | b'[' | b'{')).count();
    if nesting > 64 {
        return Err("its header nests too deep".into());
    }
    Ok(())
}

fn read_npy(reader: impl Read) -> Result<Tensor, String> {
    typed(NpyFile::new(reader).map_err(text)?)
}

fn typed<R: Read>(file: NpyFile<R>) -> Result<Tensor, String> {
    if file.uses_pickled_array() {
        return Err("it holds Python objects, which are never loaded".into());
    }
    let shape: Option<Vec<usize>> = file.shape().iter().map(|&d| usize::try_from(d).ok()).collect();
    let shape = shape.ok_or("its shape is too large")?;
    let count =
        passes::tensor::count(&shape).filter(|&n| (n as u64) < MAX_BYTES / 8).ok_or("its shape is too large")?;
    let fortran = matches!(file.order(), Order::Fortran) && shape.len() > 1;
    let NpyType::Plain(ty) = file.dtype() else { return Err("it is a structured array".into()) };
    // NumPy stores column-major arrays with the axes reversed.
    let stored = if fortran { shape.iter().rev().copied().collect() } else { shape };
    macro_rules! read {
        ($rust:ty) => {{
            let values: Vec<$rust> = file.into_vec().map_err(text)?;
            if values.len() != count {
                return Err("its data does not fill its shape".into());
            }
            Tensor::of(stored, values)
        }};
    }
    let tensor = match (ty.type_char(), ty.size_field()) {
        (TypeChar::Float, 4) => read!(f32),
        (TypeChar::Float, 8) => read!(f64),
        (TypeChar::Int, 1) => read!(i8),
        (TypeChar::Int, 2) => read!(i16),
        (TypeChar::Int, 4) => read!(i32),
        (TypeChar::Int, 8) => read!(i64),
        (TypeChar::Uint, 1) => read!(u8),
        (TypeChar::Uint, 2) => read!(u16),
        (TypeChar::Uint, 4) => read!(u32),
        (TypeChar::Uint, 8) => read!(u64),
        (TypeChar::Float, 2) => {
            let values: Vec<half::f16> = file.into_vec().map_err(text)?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            Tensor::new(DType::F16, stored, bytes.into()).map_err(text)?
        }
        (TypeChar::Bool, 1) => {
            let values: Vec<bool> = file.into_vec().map_err(text)?;
            let bytes: Vec<u8> = values.into_iter().map(u8::from).collect();
            Tensor::new(DType::Bool, stored, bytes.into()).map_err(text)?
        }
        _ => return Err(format!("its element type {ty} is not numeric")),
    };
    if fortran { reversed(&tensor) } else { Ok(tensor) }
}

/// A tensor with its axes in the opposite order.
fn reversed(tensor: &Tensor) -> Result<Tensor, String> {
    use passes::ir::{Attrs, Node, OpKey};
    let node = Node {
        name: "".into(),
        op: OpKey { domain: "".into(), name: "Transpose".into(), opset: crate::import::TARGET_OPSET },
        inputs: Vec::new(),
        outputs: Vec::new(),
        attrs: Attrs::new(),
        bodies: Vec::new(),
        notes: None,
    };
    let shared = std::sync::Arc::new(tensor.clone());
    let mut results = passes::ops::evaluate(&node, &[Some(&shared)]).map_err(text)?;
    results.pop().ok_or_else(|| "it cannot be transposed".into())
}

fn read_pb(path: &Path) -> Result<Tensor, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("cannot be read: {e}"))?;
    let wire = proto::decode_tensor(bytes.into()).map_err(text)?;
    let mut files = crate::load::ExternalFiles::beside(path);
    crate::import::tensor(&wire, &mut files).map(|tensor| tensor.as_ref().clone()).map_err(text)
}

fn read_safetensors(path: &Path) -> Result<Vec<(String, Tensor)>, String> {
    let bytes = crate::load::map(path).map_err(text)?;
    let file = SafeTensors::deserialize(&bytes).map_err(text)?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            Dtype::I8 => DType::I8,
            Dtype::U8 => DType::U8,
            Dtype::I16 => DType::I16,
            Dtype::U16 => DType::U16,
            Dtype::I32 => DType::I32,
            Dtype::U32 => DType::U32,
            Dtype::I64 => DType::I64,
            Dtype::U64 => DType::U64,
            Dtype::BOOL => DType::Bool,
            other => return Err(format!("tensor `{name}` is {other:?}, which no sample can be")),
        };
        let data = bytes::Bytes::copy_from_slice(view.data());
        tensors.push((name, Tensor::new(dtype, view.shape().to_vec(), data).map_err(text)?));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}
