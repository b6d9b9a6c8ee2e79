//! Which losses there are, and what they compare.

use crate::about::About;
use crate::returned::Returned;

/// What the user can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// What distributions lose, for outputs of the graph that a linear operator or a softmax computes; squares elsewhere.
    Fitting,
    /// Squares; of words one by one.
    Square,
    /// Squares of the block's own outputs, and what the graph's outputs lose when the rest of the model follows in float.
    Prediction,
    /// What distributions lose, for outputs of the graph, which are logits or probabilities; squares elsewhere.
    Divergence,
    /// Squares, each weighed by the squared gradient of what the graph's outputs lose.
    Fisher,
    /// The same with every sample counting as much as any other.
    FisherEach,
    /// Means and variances of channels.
    Channels,
    /// Squares, and what softmaxes along the hidden axis of words lose.
    Hidden,
}

/// The losses that `loss` names.
pub(super) static LOSSES: &[(Wish, About)] = &[
    (
        Wish::Fitting,
        About {
            name: "fitting",
            doc: "kl for outputs of the graph that a linear operator computes, which are logits most of the time, or a softmax; mse for all \
                  others.",
            source: "ours",
        },
    ),
    (
        Wish::Square,
        About {
            name: "mse",
            doc: "Squared error over signal; for words (outputs of three dimensions) over the signal of each word.",
            source: "Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3; words by themselves ours, as norms read them",
        },
    ),
    (
        Wish::Prediction,
        About {
            name: "pd",
            doc: "Prediction difference: mse of the block, and what the outputs of the graph lose (as by fitting) when the rest of the model \
                  follows in float; as much of one as of the other. Every step runs the rest of the model too.",
            source: "Liu et al. 2023 (PD-Quant), arXiv:2212.07048, section 3.2; equal parts ours",
        },
    ),
    (
        Wish::Divergence,
        About {
            name: "kl",
            doc: "Kullback-Leibler divergence of the softmax of the graph's outputs of two or three dimensions from that of the float model's, \
                  or of the outputs themselves where a softmax computes them; squares elsewhere.",
            source: "Chee et al. 2025 (DiscQuant), arXiv:2501.06417, section 4",
        },
    ),
    (
        Wish::Fisher,
        About {
            name: "fisher",
            doc: "Squared error over signal of what a block returns, every element of every sample weighed by the squared gradient that \
                  arrives there from the outputs of the float model, drawn so that its second moment is that of an error as by fitting. The \
                  mean weight is 1, so that equal weights are plain squares, words not by themselves. Costs four sweeps of the float model, \
                  each block forward twice and back once, before anything is learned, and 8 bytes per element that blocks return, for \
                  every sample.",
            source: "Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3; gradients drawn after Kunstner et al. 2019, arXiv:1905.12558",
        },
    ),
    (
        Wish::FisherEach,
        About {
            name: "fisher-each",
            doc: "As fisher, with the mean weight of every sample 1: gradients tell which elements count, and not which samples. A model is \
                  sure of most samples, whose gradients are next to nothing.",
            source: "Li et al. 2021 (BRECQ), arXiv:2102.05426, section 3; samples alike ours",
        },
    ),
    (
        Wish::Channels,
        About {
            name: "channels",
            doc: "How far means and variances of the channels of what a block returns are from those of the float model, sample by sample, \
                  over the output's root mean square and its square: channels lie along the last axis, of tensors of four dimensions along \
                  the second. Meant for norms alone (codes=0, scales=0, biases=0, norms=2).",
            source: "Li et al. 2023 (Norm Tweaking), arXiv:2309.02784; behind the float model's own blocks, and in units of the output, ours",
        },
    ),
    (
        Wish::Hidden,
        About {
            name: "hidden",
            doc: "mse of what a block returns, and the divergence of the softmax along the hidden axis of every word from that of the float \
                  model's, words divided by their root mean square; as much of one as of the other for small errors. Outputs of the \
                  graph that are logits or probabilities as by fitting; mse alone for tensors of four dimensions.",
            source: "Ding et al. 2023 (CBQ), arXiv:2312.07950, section 3.2; units and equal parts ours",
        },
    ),
];

/// How errors can be measured where something is learned, in the order of the manual.
pub fn losses() -> impl Iterator<Item = &'static About> {
    LOSSES.iter().map(|(_, about)| about)
}

impl Wish {
    /// Whether gradients tell what errors of blocks weigh.
    pub(super) fn weighs(self) -> bool {
        matches!(self, Self::Fisher | Self::FisherEach)
    }

    /// Whether it is about what blocks return, and not about the whole model.
    pub(super) fn is_of_blocks(self) -> bool {
        self.weighs() || matches!(self, Self::Prediction | Self::Channels | Self::Hidden)
    }

    /// What an output that is `returned` so is compared as, where its shape allows.
    pub(super) fn kind(self, returned: Returned) -> Kind {
        match (self, returned) {
            (Self::Divergence | Self::Fitting | Self::Prediction | Self::Hidden, Returned::Probabilities) => {
                Kind::Probabilities
            }
            (Self::Divergence, Returned::Logits | Returned::Other)
            | (Self::Fitting | Self::Prediction | Self::Hidden, Returned::Logits) => Kind::Logits,
            _ => Kind::Numbers,
        }
    }
}

/// What the numbers of an output are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Numbers of no kind.
    Numbers,
    /// Rows of logits.
    Logits,
    /// Rows of probabilities.
    Probabilities,
}
