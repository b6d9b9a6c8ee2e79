//! Types of values: element types and symbolic shapes, as far as they are known.

use std::fmt;

use bytes::Bytes;

use crate::id::Name;
use crate::tensor::{DType, Tensor};

/// One dimension.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dim {
    /// Always this many.
    Known(usize),
    /// The same number wherever this symbol stands.
    Symbol(Name),
    /// Nothing is known.
    Unknown,
}

impl Dim {
    /// The number, where it is known.
    pub fn known(&self) -> Option<usize> {
        match self {
            Self::Known(n) => Some(*n),
            _ => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(n) => write!(f, "{n}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// What is known of a tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TensorType {
    /// The element type.
    pub dtype: Option<DType>,
    /// `None`: not even the rank is known.
    pub shape: Option<Vec<Dim>>,
}

impl TensorType {
    /// A type with everything known.
    pub fn of(tensor: &Tensor) -> Self {
        Self::known(tensor.dtype(), tensor.shape())
    }

    /// A type with everything known.
    pub fn known(dtype: DType, shape: &[usize]) -> Self {
        Self { dtype: Some(dtype), shape: Some(shape.iter().map(|&d| Dim::Known(d)).collect()) }
    }

    /// A type of which only the parts given are known.
    pub fn new(dtype: Option<DType>, shape: Option<Vec<Dim>>) -> Self {
        Self { dtype, shape }
    }

    /// The number of dimensions, where known.
    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(Vec::len)
    }

    /// The shape, where every dimension is known.
    pub fn known_shape(&self) -> Option<Vec<usize>> {
        self.shape.as_ref()?.iter().map(Dim::known).collect()
    }

    /// What both say together: each fills what the other leaves open. Where they contradict each other, `self` stands.
    #[must_use]
    pub fn refined(&self, other: &Self) -> Self {
        let shape = match (&self.shape, &other.shape) {
            (Some(a), Some(b)) if a.len() == b.len() => Some(a.iter().zip(b).map(|(a, b)| refine(a, b)).collect()),
            (Some(a), _) => Some(a.clone()),
            (None, b) => b.clone(),
        };
        Self { dtype: self.dtype.or(other.dtype), shape }
    }
}

fn refine(a: &Dim, b: &Dim) -> Dim {
    match (a, b) {
        (Dim::Known(_), _) | (Dim::Symbol(_), Dim::Unknown | Dim::Symbol(_)) => a.clone(),
        _ => b.clone(),
    }
}

/// The type of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// A dense tensor.
    Tensor(TensorType),
    /// A sequence, map, optional or sparse tensor: the encoded `TypeProto`, carried as it is.
    Opaque(Bytes),
}

impl Default for Type {
    fn default() -> Self {
        Self::Tensor(TensorType::default())
    }
}

impl Type {
    /// The tensor type, where it is one.
    pub fn tensor(&self) -> Option<&TensorType> {
        match self {
            Self::Tensor(tensor) => Some(tensor),
            Self::Opaque(_) => None,
        }
    }

    /// The element type, where known.
    pub fn dtype(&self) -> Option<DType> {
        self.tensor()?.dtype
    }

    /// The rank, where known.
    pub fn rank(&self) -> Option<usize> {
        self.tensor()?.rank()
    }
}

impl fmt::Display for TensorType {
    /// `f32[batch,3,?]`, `f32` where the rank is unknown, `?` where nothing is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dtype.map_or("?", DType::name))?;
        if let Some(shape) = &self.shape {
            f.write_str("[")?;
            for (index, dim) in shape.iter().enumerate() {
                if index > 0 {
                    f.write_str(",")?;
                }
                write!(f, "{dim}")?;
            }
            f.write_str("]")?;
        }
        Ok(())
    }
}
