//! Pictures, with stated preprocessing.

use std::path::Path;

use image::imageops::FilterType;
use passes::tensor::Tensor;

use super::Slot;
use super::fit::is_open;

/// How a picture becomes a tensor: resized, scaled to [0, 1], then `(x − mean) / std` per channel.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageOptions {
    /// Per channel; one number counts for all.
    pub mean: Vec<f32>,
    /// Per channel; one number counts for all.
    pub std: Vec<f32>,
    /// Height and width; `None` takes what the model declares.
    pub size: Option<(u32, u32)>,
}

/// The longest side that a picture is resized to.
const MAX_SIDE: u32 = 16_384;

/// Text that states no preprocessing.
#[derive(Debug, thiserror::Error)]
#[error("--image: {0}; write it as mean=0.485:0.456:0.406,std=0.229:0.224:0.225,size=224x224")]
pub struct ImageError(String);

impl std::str::FromStr for ImageOptions {
    type Err = ImageError;

    /// `mean=a:b:c,std=a:b:c,size=HxW`; mean 0 and std 1 where left out.
    fn from_str(text: &str) -> Result<Self, ImageError> {
        let mut options = Self { mean: vec![0.0], std: vec![1.0], size: None };
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| ImageError(format!("`{part}` is no key=value")))?;
            match key {
                "mean" => options.mean = numbers(value)?,
                "std" => options.std = numbers(value)?,
                "size" => options.size = Some(size(value)?),
                other => return Err(ImageError(format!("`{other}` is none of mean, std, size"))),
            }
        }
        if options.std.iter().any(|&s| s <= 0.0) {
            return Err(ImageError("a std is not positive".into()));
        }
        Ok(options)
    }
}

fn numbers(text: &str) -> Result<Vec<f32>, ImageError> {
    let number = |part: &str| part.parse::<f32>().ok().filter(|v| v.is_finite());
    let values: Option<Vec<f32>> = text.split(':').map(number).collect();
    values
        .filter(|v| v.len() == 1 || v.len() == 3)
        .ok_or_else(|| ImageError(format!("`{text}` is not one or three numbers")))
}

fn size(text: &str) -> Result<(u32, u32), ImageError> {
    let side = |part: &str| part.parse::<u32>().ok().filter(|&n| (1..=MAX_SIDE).contains(&n));
    let (height, width) = text.split_once('x').unwrap_or((text, text));
    side(height).zip(side(width)).ok_or_else(|| ImageError(format!("`{text}` is no size")))
}

/// The picture at `path` for the only input of the model, channels first or last as its shape says.
pub(super) fn read(path: &Path, slots: &[Slot], options: &ImageOptions) -> Result<Vec<(String, Tensor)>, String> {
    let [slot] = slots else { return Err(format!("a picture feeds one input, and the model takes {}", slots.len())) };
    let shape = slot.ty.shape.as_ref().filter(|s| s.len() == 4).ok_or("the model's input is no batch of pictures")?;
    let channels_of = |axis: usize| shape[axis].known().filter(|&c| c == 1 || c == 3);
    let (first, channels) = match (channels_of(1), channels_of(3)) {
        (Some(c), _) => (true, c),
        (None, Some(c)) => (false, c),
        (None, None) if is_open(shape.get(1)) => (true, 3),
        _ => return Err("the model's input has neither 1 nor 3 channels".into()),
    };
    let spatial = if first { (&shape[2], &shape[3]) } else { (&shape[1], &shape[2]) };
    let declared = spatial.0.known().zip(spatial.1.known());
    let declared = declared.and_then(|(h, w)| Some((u32::try_from(h).ok()?, u32::try_from(w).ok()?)));
    let declared = declared.filter(|&(h, w)| h.max(w) <= MAX_SIDE && h.min(w) >= 1);
    let (height, width) = options.size.or(declared).ok_or("the model's size is open: state size= in --image")?;
    let picture = image::open(path).map_err(|e| format!("cannot be read: {e}"))?;
    let pixels = if channels == 3 {
        image::imageops::resize(&picture.to_rgb8(), width, height, FilterType::Triangle).into_raw()
    } else {
        image::imageops::resize(&picture.to_luma8(), width, height, FilterType::Triangle).into_raw()
    };
    let of = |list: &[f32], c: usize| list.get(c).or(list.first()).copied().unwrap_or(0.0);
    let value = |pixel: u8, c: usize| (f32::from(pixel) / 255.0 - of(&options.mean, c)) / of(&options.std, c);
    let (h, w) = (height as usize, width as usize);
    let tensor = if first {
        let plane = |c: usize| pixels.iter().skip(c).step_by(channels).map(move |&p| (p, c));
        let values = (0..channels).flat_map(plane).map(|(p, c)| value(p, c)).collect();
        Tensor::of([1, channels, h, w], values)
    } else {
        let values = pixels.iter().enumerate().map(|(i, &p)| value(p, i % channels)).collect();
        Tensor::of([1, h, w, channels], values)
    };
    Ok(vec![(slot.name.clone(), tensor)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preprocessing_is_stated() {
        let options: ImageOptions = "mean=0.5,std=0.25:0.5:1,size=8x4".parse().unwrap();
        assert_eq!(options, ImageOptions { mean: vec![0.5], std: vec![0.25, 0.5, 1.0], size: Some((8, 4)) });
        for bad in ["mean", "mean=a", "std=0", "size=0", "size=999999", "size=4x", "gamma=2", "mean=1:2"] {
            assert!(bad.parse::<ImageOptions>().is_err(), "{bad}");
        }
    }
}
