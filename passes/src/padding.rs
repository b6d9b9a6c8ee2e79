//! Padding in batches of texts: positions that say nothing about the model.

use crate::ir::Graph;
use crate::tensor::Tensor;

/// `tensor` without the positions that `mask` calls padding, where it has them.
pub(crate) fn without(mask: Option<&Mask>, tensor: Tensor) -> Tensor {
    mask.and_then(|mask| mask.kept(&tensor)).unwrap_or(tensor)
}

/// Which positions of a batch of texts are words and not padding.
#[derive(Clone, Debug)]
pub(crate) struct Mask {
    extents: [usize; 2],
    words: Vec<bool>,
}

impl Mask {
    /// What the input `attention_mask` says, where there is one of shape \[batch, positions\] that leaves something out.
    pub(crate) fn of(graph: &Graph, feeds: &[Tensor]) -> Option<Self> {
        let at = graph.inputs().iter().position(|input| &*graph.value(*input).name == "attention_mask")?;
        let extents: [usize; 2] = feeds.get(at)?.shape().try_into().ok()?;
        let words: Vec<bool> = feeds[at].integers()?.iter().map(|&v| v != 0).collect();
        words.contains(&false).then_some(Self { extents, words })
    }

    /// Which rows of a tensor of `shape` are words; `None` for tensors without a row per position.
    pub(crate) fn words(&self, shape: &[usize]) -> Option<&[bool]> {
        // Rank 3 only: of four axes the second one runs over heads.
        let [batch, positions, _] = *shape else { return None };
        ([batch, positions] == self.extents).then_some(&self.words)
    }

    /// Which of so many rows are words; `None` where there is not one per position.
    pub(crate) fn of_rows(&self, rows: usize) -> Option<&[bool]> {
        (rows == self.words.len()).then_some(&self.words)
    }

    /// The words of a tensor that has a row, or several, per position; `None` for others.
    pub(crate) fn kept(&self, tensor: &Tensor) -> Option<Tensor> {
        self.words(tensor.shape())?;
        let width = *tensor.shape().last()?;
        let values = tensor.values::<f32>()?;
        let rows = values.chunks_exact(width.max(1)).zip(&self.words);
        let kept: Vec<f32> = rows.filter(|(_, word)| **word).flat_map(|(row, _)| row.iter().copied()).collect();
        let n = self.words.iter().filter(|word| **word).count();
        Some(Tensor::of([1, n, width], kept))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_left_out() {
        let mask = Mask { extents: [2, 2], words: vec![true, false, true, true] };
        let tensor = Tensor::of([2, 2, 2], vec![1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let kept = mask.kept(&tensor).unwrap();
        assert_eq!(
            (kept.shape(), &*kept.values::<f32>().unwrap()),
            (&[1, 3, 2][..], &[1.0, 2.0, 5.0, 6.0, 7.0, 8.0][..])
        );
        assert!(mask.kept(&Tensor::of([2, 2], vec![0.0_f32; 4])).is_none());
        assert!(mask.kept(&Tensor::of([2, 3, 1], vec![0.0_f32; 6])).is_none());
    }
}
