//! What the user can set about learning.

use std::collections::BTreeSet;

use super::inputs::Inputs;
use super::measure;
use super::parameterization::{self, Parameterization};
use crate::pass::{OptionError, Options};

/// Something that can be learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Codes of weights.
    Codes,
    /// Scales of weights.
    Scales,
    /// Biases.
    Biases,
    /// Scales and shifts of norms that compute in float.
    Norms,
    /// Scales of activations.
    Steps,
}

/// What options call the parts, and which of them are learned where nothing is said.
const PARTS: &[(Part, &str, usize)] = &[
    (Part::Codes, "codes", 1),
    (Part::Scales, "scales", 1),
    (Part::Biases, "biases", 1),
    (Part::Norms, "norms", 0),
    (Part::Steps, "steps", 0),
];

/// How something is learned.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) method: &'static dyn Parameterization,
    pub(super) iterations: usize,
    pub(super) batch: usize,
    /// Times the usual rate.
    pub(super) rate: f32,
    /// The share of the steps in which the rate rises.
    warmup: f32,
    /// Learning ends where so many checks in a row found nothing better; 0 for never.
    patience: usize,
    /// The share of activations that stay in float while learning, in thousandths.
    pub(super) drop: i64,
    /// What blocks read while they are learned.
    pub(super) inputs: Inputs,
    /// What is learned.
    parts: BTreeSet<Part>,
    /// How errors are measured.
    pub(super) loss: measure::Wish,
}

/// What holds where options say nothing.
pub(super) struct Usual {
    pub(super) learn: &'static str,
    pub(super) iterations: usize,
    pub(super) batch: usize,
    pub(super) norms: bool,
    pub(super) loss: &'static str,
    pub(super) warmup: f32,
}

/// So often what has been learned is judged on the way.
const CHECKS: usize = 10;

impl Settings {
    /// What `options` say; `None` where nothing is to be learned.
    pub(super) fn of(options: &Options, usual: &Usual) -> Result<Option<Self>, OptionError> {
        let name = options.text("learn", usual.learn);
        if name == "none" {
            return Ok(None);
        }
        let method = parameterization::find(name).ok_or_else(|| {
            let names: Vec<&str> = parameterization::PARAMETERIZATIONS.iter().map(|p| p.about().name).collect();
            OptionError { option: "learn".into(), problem: format!("`{name}` is none of none, {}", names.join(", ")) }
        })?;
        let positive = |name: &str, default: f64, most: f64| -> Result<f64, OptionError> {
            match options.number(name)?.unwrap_or(default) {
                value if (0.0..=most).contains(&value) => Ok(value),
                _ => Err(OptionError { option: name.into(), problem: format!("it must lie between 0 and {most}") }),
            }
        };
        let mut parts = BTreeSet::new();
        for (part, name, default) in PARTS {
            // What leaves biases leaves norms, where nothing is said of those.
            let norms = || Ok(usize::from(usual.norms && options.count("biases", 1)? > 0));
            let default = if *part == Part::Norms { norms()? } else { *default };
            parts.extend((options.count(name, default)? > 0).then_some(*part));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
        let settings = Self {
            method,
            iterations: positive("iterations", usual.iterations as f64, 1e6)? as usize,
            batch: options.count("batch", usual.batch)?.max(1),
            rate: positive("rate", 1.0, 1e3)? as f32,
            warmup: usual.warmup,
            patience: options.count("patience", 0)?,
            drop: (positive("drop", 0.0, 1.0)? * 1000.0) as i64,
            inputs: Inputs::of(options.text("inputs", "quantized"))?,
            parts,
            loss: loss(options.text("loss", usual.loss))?,
        };
        Ok(Some(settings))
    }

    /// Whether `part` is learned.
    pub(super) fn learns(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// The same, with scales only where they are `free`: those of formats of their own, and powers of two, stay what they are.
    pub(super) fn with_scales(&self, free: bool) -> Self {
        let mut settings = self.clone();
        if !free || self.method.keeps_scales() {
            settings.parts.remove(&Part::Scales);
        }
        if !free {
            settings.parts.remove(&Part::Steps);
        }
        settings
    }

    /// The share of the rate in effect at `progress` of the way: Adam's first steps go by the signs of a few samples' gradients.
    pub(super) fn warmth(&self, progress: f32) -> f32 {
        if self.warmup > 0.0 { ((progress + 1.0 / self.iterations as f32) / self.warmup).min(1.0) } else { 1.0 }
    }

    /// Whether to go on where so many checks in a row found nothing better.
    pub(super) fn goes_on(&self, in_vain: usize) -> bool {
        self.patience == 0 || in_vain < self.patience
    }

    /// Whether what has been learned is judged before this iteration.
    pub(super) fn is_check(&self, iteration: usize) -> bool {
        iteration > 0 && iteration.is_multiple_of((self.iterations / CHECKS).max(1))
    }
}

/// The loss called `name`.
fn loss(name: &str) -> Result<measure::Wish, OptionError> {
    let found = measure::LOSSES.iter().find(|(_, about)| about.name == name).map(|(wish, _)| *wish);
    found.ok_or_else(|| {
        let names: Vec<&str> = measure::LOSSES.iter().map(|(_, about)| about.name).collect();
        OptionError { option: "loss".into(), problem: format!("`{name}` is none of {}", names.join(", ")) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_over_the_share_that_it_is_given() {
        let settings = |warmup| {
            let usual = Usual { learn: "latent", iterations: 20, batch: 1, norms: false, loss: "mse", warmup };
            Settings::of(&Options::default(), &usual).unwrap().unwrap()
        };
        let steps =
            |warmup: f32| (0..6_u8).map(move |at| settings(warmup).warmth(f32::from(at) / 20.0)).collect::<Vec<_>>();
        let near = |found: &[f32], wanted: &[f32]| found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(&steps(0.2), &[0.25, 0.5, 0.75, 1.0, 1.0, 1.0]), "{:?}", steps(0.2));
        assert_eq!(steps(0.0), [1.0; 6]);
    }
}
