//! What several commands share.

use std::path::{Path, PathBuf};

use passes::target::{Goal, Scheme, Target};

use super::progress::Mode;
use crate::dataset::ImageOptions;
use crate::driver::{Error, Kept, Request, Rest, Select};
use crate::targets;

/// Options about samples and how they are run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DataArgs {
    /// Calibration samples: a folder or file of .npz, .npy, .pb, .safetensors, or images with --image.
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,
    /// How images become samples: mean=0.485:0.456:0.406,std=0.229:0.224:0.225,size=224x224.
    #[arg(long, value_name = "TEXT")]
    pub(crate) image: Option<ImageOptions>,
    /// Use at most so many samples.
    #[arg(long, value_name = "N")]
    pub(crate) samples: Option<usize>,
    /// How those are chosen out of more: herding takes those whose second moments come nearest to all of them.
    #[arg(long, value_enum, default_value = "first")]
    pub(crate) select: Select,
    /// What runs the float model: auto, tract, rten, or ort when built with that feature.
    #[arg(long, default_value = "auto")]
    pub(crate) executor: String,
    /// Worker threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// The most memory that the run may take, such as 500M or 2G.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) max_memory: Option<u64>,
    /// How progress is shown, on standard error.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) progress: Mode,
}

impl DataArgs {
    /// The number of worker threads.
    pub(crate) fn n_threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }

    /// A request about `input` with these options and defaults for everything else.
    pub(crate) fn request(&self, input: &Path, target: &str) -> Result<Request, Error> {
        Ok(Request {
            input: input.to_owned(),
            output: None,
            data: self.data.clone(),
            image: self.image.clone(),
            samples: self.samples,
            select: self.select,
            hold_out: 0,
            augment: None,
            views: 0,
            stats: None,
            target: target_named(target)?,
            layout: crate::emit::Layout::default(),
            scheme: Scheme::W8A8,
            goal: Goal::Balanced,
            pipeline: None,
            observer: None,
            rounding: None,
            keep_float: Vec::new(),
            set: Vec::new(),
            embeddings: None,
            cache: None,
            rotate: false,
            rest: Rest::F32,
            journal: Kept::Used,
            learn: None,
            distill: None,
            budget: None,
            sensitivity: None,
            first_order: false,
            max_drop: None,
            executor: self.executor.clone(),
            threads: self.n_threads(),
            max_memory: self.max_memory,
        })
    }
}

/// The target called `name`.
pub(crate) fn target_named(name: &str) -> Result<&'static dyn Target, Error> {
    targets::find(name).ok_or_else(|| {
        let names: Vec<&str> = targets::TARGETS.iter().map(|t| t.info().about.name).collect();
        Error::Target(format!("there is no target `{name}` yet; there are {}", names.join(", ")))
    })
}

/// Bytes from `500M`, `2G`, `1000000`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" => 1_000,
        "M" | "MB" => 1_000_000,
        "G" | "GB" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        other => return Err(format!("`{other}` is no unit; use K, M or G")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is no size; write 500M or 2G"))?;
    number.checked_mul(unit).ok_or_else(|| format!("`{text}` is too large"))
}

/// A number over 0, or a percentage: `0.01`, `1%`.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    let (number, unit) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 0.01));
    let value = number.trim().parse::<f64>().map(|value| value * unit);
    let value = value.map_err(|_| format!("`{text}` is no number; write 0.01 or 1%"))?;
    if value > 0.0 && value.is_finite() { Ok(value) } else { Err(format!("`{text}` is not over 0")) }
}

/// `w8a8`, `w4a16g32`, `w4a16g32asym` and their like.
pub(crate) fn scheme(text: &str) -> Result<Scheme, String> {
    Scheme::parse(text).ok_or_else(|| {
        format!(
            "`{text}` is no scheme; write w8a8, w4a16g32 (blocks of 32 inputs), w4a16g32asym (with zero points), w8a8pow2 (scales that are powers of two), w8a8dyn (ranges of activations chosen by each run), wfp8afp8 or \
             wmxfp4a16 (any of `list formats`)"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_schemes_are_read() {
        assert_eq!(size("500M"), Ok(500_000_000));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert!(size("2X").is_err() && size("").is_err() && size("99999999999G").is_err());
        assert_eq!(share("1%"), Ok(0.01));
        assert!(share("0").is_err() && share("nan").is_err() && share("-1").is_err() && share("x").is_err());
        assert_eq!(scheme("w8a8"), Ok(Scheme::W8A8));
        for text in [
            "w4a16g32",
            "w3a16g64asym",
            "w4a8",
            "w2a16",
            "wfp8afp8",
            "w8a8dyn",
            "wmxfp4a16",
            "we2m3a8",
            "wnf4a16g64",
            "wfloat8e4m3b11fnuza16",
        ] {
            assert_eq!(scheme(text).unwrap().to_string(), text);
        }
        assert!(scheme("wfoo3a8").is_err() && scheme("w8amxfp4").is_err() && scheme("wfp8a16asym").is_err());
        assert!(scheme("int8").is_err() && scheme("w4a16g0").is_err() && scheme("w4a16gx").is_err());
        assert!(scheme("w8a16dyn").is_err(), "float activations have no range");
    }
}
