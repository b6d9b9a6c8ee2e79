//! The text of the pipeline: the target's, changed by what the user asked for.

use passes::reconstruct::PARAMETERIZATIONS;
use passes::target::{Goal, RangesOf, Scheme};

use crate::driver::{Request, Rest};

/// What will run for `request`.
pub(crate) fn pipeline_text(request: &Request) -> String {
    with_drop(request, request.max_drop)
}

/// The same, followed by those in which weights get ever more bits to keep the loss of all within `--max-drop`.
pub(crate) fn pipelines(request: &Request) -> Vec<String> {
    let mut texts = vec![pipeline_text(request)];
    for share in [0.5, 0.125, 0.0] {
        // The smallest share takes all the bits there are.
        let text = with_drop(request, request.max_drop.map(|allowed| (allowed * share).max(1e-30)));
        if texts.last() != Some(&text) {
            texts.push(text);
        }
    }
    texts
}

fn with_drop(request: &Request, max_drop: Option<f64>) -> String {
    let scheme = Scheme { weight_bits: fewest_bits(request), ..request.scheme };
    let text = request.pipeline.clone().unwrap_or_else(|| {
        let text = request.target.pipeline(request.goal, &scheme);
        let text = if request.rotate { with_rotation(&text) } else { text.into_owned() };
        let text = request.cache.map_or(text.clone(), |bits| with_caches(&text, bits, request.data.is_some()));
        with_damping(&text, request.augment.unwrap_or(0))
    });
    let text = request.observer.as_ref().map_or(text.clone(), |observer| with_observer(&text, observer));
    let text = request.rounding.as_ref().map_or(text.clone(), |method| with_rounding(&text, method));
    let learn = request.learn.as_ref().map(|method| resolved(method, &scheme));
    let text = learn.as_ref().map_or(text.clone(), |method| with_learning(&text, method));
    let text = match &request.distill {
        Some(method) if request.pipeline.is_none() => with_distillation(&with_leanings(&text, method), method),
        Some(method) => with_distillation(&text, method),
        None => text,
    };
    let learns = request.distill.is_some() || learn.is_some_and(|method| !method.starts_with("none"));
    let text = if learns && request.pipeline.is_none() {
        with_judges(&text, request.augment.unwrap_or(0) + request.views)
    } else {
        text
    };
    let text = if request.rest == Rest::F16 { format!("{}, round-to-half", text.trim_end()) } else { text };
    let max_drop = max_drop.filter(|_| raises(request) || request.budget.is_some());
    with_allocation(&text, request.budget, max_drop, request.sensitivity.as_deref())
}

/// Where samples hold fewer words, a recipe draws variants of them. Chosen between the zoo's two models of text: with 3,618 words variants gain a
/// decibel, with 5,228 nothing (CHANGELOG.md).
const FEW_WORDS: usize = 5_000;
/// It draws until there are so many.
const WORDS: usize = 20_000;
/// The most variants of a sample that a recipe draws.
const MOST_VARIANTS: usize = 8;

/// Whether the recipe of `request` draws variants where words are few: where weights of few bits are rounded by second moments of them, and the
/// user said nothing of it.
pub(crate) fn asks_for_words(request: &Request) -> bool {
    let is_free = request.pipeline.is_none() && request.augment.is_none() && request.views == 0;
    let by_moments = !request.scheme.fixes_ranges() && request.scheme.dynamic != Some(RangesOf::Tensor);
    request.goal == Goal::Best && is_free && by_moments && fewest_bits(request) < 8
}

/// How many variants of every sample a recipe draws where all hold so many `words`.
pub(crate) fn variants(words: usize) -> usize {
    let few = (1..FEW_WORDS).contains(&words);
    if few { (WORDS / words).saturating_sub(1).min(MOST_VARIANTS) } else { 0 }
}

/// Whether weights can have more bits: where they have eight already, all that helps is float.
fn raises(request: &Request) -> bool {
    request.scheme.weight_format.is_none() && request.scheme.weight_bits < 8
}

/// The fewest bits that a weight may come to have: they say how weights are best rounded.
fn fewest_bits(request: &Request) -> u32 {
    let set = request.set.iter().filter_map(|set| set.scheme).map(|scheme| scheme.weight_bits);
    let spent = request.budget.filter(|bits| *bits < f64::from(request.scheme.weight_bits)).map(|_| 4);
    set.chain(spent).chain([request.scheme.weight_bits]).min().unwrap_or(8)
}

/// `text` with the pass that gives weights their bits by `metric` right after `assign-encodings`, with its `weights`, where anything is
/// asked of it and it is not there yet.
fn with_allocation(text: &str, budget: Option<f64>, max_drop: Option<f64>, metric: Option<&str>) -> String {
    const BEFORE: &str = "assign-encodings";
    let commented = |at: usize| text[..at].rsplit('\n').next().is_some_and(|line| line.contains('#'));
    let find = |name: &str| text.match_indices(name).map(|(at, _)| at).find(|at| !commented(*at));
    let mut given: Vec<String> = [("budget", budget), ("max-drop", max_drop)]
        .iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", (*value)?)))
        .collect();
    let Some(at) = find(BEFORE).filter(|_| !given.is_empty() && find("allocate-bits").is_none()) else {
        return text.to_owned();
    };
    given.extend(metric.map(|metric| format!("metric={metric}")));
    let rest = &text[at + BEFORE.len()..];
    let blank = rest.len() - rest.trim_start().len();
    let options = if rest[blank..].starts_with('{') { rest.find('}').map_or(rest.len(), |end| end + 1) } else { 0 };
    let weights = rest[..options].find("weights=").map(|from| {
        let value = &rest[from + "weights=".len()..];
        format!(", weights={}", &value[..value.find([',', '}', ' ', '\n']).unwrap_or(value.len())])
    });
    let (before, after) = text.split_at(at + BEFORE.len() + options);
    format!("{before}, allocate-bits{{{}{}}}{after}", given.join(", "), weights.unwrap_or_default())
}

/// `text` with residual streams rotated before anything is measured, every `Gemm` taken apart first.
fn with_rotation(text: &str) -> String {
    let at = text.find("calibrate").unwrap_or(text.len());
    let split = if text[..at].contains("split-gemm") { "" } else { "split-gemm, " };
    format!("{}{split}rotate, infer-shapes, drop-dead,\n{}", &text[..at], &text[at..])
}

/// `text` with caches in codes of so many `bits` before anything is measured; smoothed where there are few, and samples.
fn with_caches(text: &str, bits: u32, samples: bool) -> String {
    let at = text.find("calibrate").unwrap_or(text.len());
    // What comes before the first calibration sees no samples.
    let smooth = if samples && bits < 8 { "calibrate, smooth-caches, " } else { "" };
    format!("{}{smooth}encode-caches{{bits={bits}}},\n{}", &text[..at], &text[at..])
}

/// `text` with less damping where there are `variants` of every sample: what it guards against is few samples.
fn with_damping(text: &str, variants: usize) -> String {
    if variants == 0 || text.contains("damping=") {
        return text.to_owned();
    }
    let damping = format!("damping={:.2}", 2.0 / (variants as f64 + 2.0));
    with_option(text, "round-in-order", &damping)
}

/// `text` with samples that judge what is learned left out of rounding, where there are `variants` of every sample: of few samples rounding
/// needs all.
fn with_judges(text: &str, variants: usize) -> String {
    if variants == 0 || text.contains("spare=") {
        return text.to_owned();
    }
    with_option(text, "round-in-order", "spare=1")
}

/// `text` with rounding told to keep where weights would go, where `distill` by `method` learns codes from there.
fn with_leanings(text: &str, method: &str) -> String {
    let name = method.split('{').next().unwrap_or_default().trim();
    let leans = PARAMETERIZATIONS.iter().any(|known| known.about().name == name && known.leans());
    if !leans || text.contains("lean=") || method.replace(' ', "").contains("codes=0") {
        return text.to_owned();
    }
    with_option(text, "round-in-order", "lean=1")
}

/// `text` with `option` first among those of the pass `name`, where it is there.
fn with_option(text: &str, name: &str, option: &str) -> String {
    match text.split_once(name) {
        Some((before, after)) => match after.strip_prefix('{') {
            Some(rest) => format!("{before}{name}{{{option}, {rest}"),
            None => format!("{before}{name}{{{option}}}{after}"),
        },
        None => text.to_owned(),
    }
}

/// The name that stands for what wins for the scheme.
pub(crate) const AUTO: &str = "auto";

/// What wins for `scheme` on the zoo, by the tables of `docs/learning.md` (`tests/bench/learning.py`): the most decibels over the models
/// that were tried; where two come out alike (`w4a4`: brecq and talr), that which gained on more of them. Weights of five bits and more
/// leave nothing to learn.
fn winner(scheme: &Scheme) -> &'static str {
    match (scheme.weight_format, scheme.weight_bits, scheme.fixes_ranges()) {
        (_, 5.., _) => "none",
        (Some(_), ..) => "latent",
        (None, 2, true) if scheme.activation_bits == Some(4) => "brecq",
        (None, ..=2, true) => "talr",
        (None, ..=2, false) => "lora-rounding",
        (None, 4, true) if scheme.activation_bits == Some(8) => "lrq",
        _ => "brecq",
    }
}

/// `method`, or where that is [`AUTO`] the winner, with the options that stand behind it.
fn resolved(method: &str, scheme: &Scheme) -> String {
    match method.trim().strip_prefix(AUTO).filter(|rest| rest.trim().is_empty() || rest.trim().starts_with('{')) {
        Some(options) => format!("{}{options}", winner(scheme)),
        None => method.to_owned(),
    }
}

/// `text` in which weights are learned by `method`, which may carry options in braces, once they are rounded in order.
fn with_learning(text: &str, method: &str) -> String {
    with_option(text, "round-in-order", &learning(method))
}

/// The options that say to learn by `method`, which may carry more of them in braces.
fn learning(method: &str) -> String {
    let (name, options) = match method.split_once('{') {
        Some((name, options)) => (name.trim(), options.trim().trim_end_matches('}').trim()),
        None => (method.trim(), ""),
    };
    let comma = if options.is_empty() { "" } else { ", " };
    format!("learn={name}{comma}{options}")
}

/// `text` followed by learning by `method`, which may carry options in braces, from the whole model.
fn with_distillation(text: &str, method: &str) -> String {
    format!("{}\n, distill{{{}}}", text.trim_end(), learning(method))
}

/// `text` with another observer in `assign-encodings`.
fn with_observer(text: &str, observer: &str) -> String {
    with_value(&with_value(text, "observer=", observer), "products=", observer)
}

/// `text` with another method in `round`.
fn with_rounding(text: &str, method: &str) -> String {
    if text.contains("method=") {
        return with_value(text, "method=", method);
    }
    if text.contains("round-in-order") {
        return with_option(text, "round-in-order", &format!("method={method}"));
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || "-{".contains(c);
    let whole = |at: &usize| {
        let (before, after) = (text[..*at].chars().next_back(), text[at + "round".len()..].chars().next());
        !before.is_some_and(is_name) && !after.is_some_and(is_name)
    };
    match text.match_indices("round").map(|(at, _)| at).find(whole) {
        Some(at) => format!("{}round{{method={method}}}{}", &text[..at], &text[at + "round".len()..]),
        None => text.to_owned(),
    }
}

/// `text` with what follows `key` replaced by `new`.
fn with_value(text: &str, key: &str, new: &str) -> String {
    let Some(start) = text.find(key) else { return text.to_owned() };
    let value = start + key.len();
    let end = text[value..].find([',', '}', ' ', '\n']).map_or(text.len(), |n| value + n);
    format!("{}{new}{}", &text[..value], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_make_up_for_words_that_are_missing() {
        assert_eq!([0, 1, 2_500, 3_618, 4_999, 5_000, 20_000].map(variants), [0, 8, 7, 4, 3, 0, 0]);
    }

    #[test]
    fn options_find_their_place_in_a_pipeline() {
        let text = "calibrate, assign-encodings{observer=mse, products=min-max}, round, correct-bias";
        let want = "calibrate, assign-encodings{observer=entropy, products=entropy}, round, correct-bias";
        assert_eq!(with_observer(text, "entropy"), want);
        let gptq = with_rounding(text, "gptq");
        assert!(gptq.contains(", round{method=gptq}, correct-bias"), "{gptq}");
        assert_eq!(with_rounding("a,round", "gptq"), "a,round{method=gptq}");
        assert_eq!(
            with_rounding("a, round-in-order{refit=3}", "nearest"),
            "a, round-in-order{method=nearest, refit=3}"
        );
        assert_eq!(with_rounding("a, round-in-order, b", "gptq"), "a, round-in-order{method=gptq}, b");
        assert_eq!(with_damping("a, round-in-order{refit=3}", 8), "a, round-in-order{damping=0.20, refit=3}");
        assert_eq!(with_judges("a, round-in-order{refit=3}", 4), "a, round-in-order{spare=1, refit=3}");
        assert_eq!(with_judges("a, round-in-order", 0), "a, round-in-order");
        assert_eq!(with_judges("a, round-in-order{learn=lrq, spare=0}", 4), "a, round-in-order{learn=lrq, spare=0}");
        let turned = with_rotation("fold-constants, drop-dead,\ncalibrate, smooth,\ncalibrate, round");
        assert_eq!(
            turned,
            "fold-constants, drop-dead,\nsplit-gemm, rotate, infer-shapes, drop-dead,\ncalibrate, smooth,\ncalibrate, round"
        );
        assert_eq!(with_damping("a, round-in-order", 0), "a, round-in-order");
        assert_eq!(with_learning("a, round-in-order, b", "lrq"), "a, round-in-order{learn=lrq}, b");
        let learned = with_learning("a, round-in-order{refit=3}", "brecq{iterations=9, batch=2}");
        assert_eq!(learned, "a, round-in-order{learn=brecq, iterations=9, batch=2, refit=3}");
        for (scheme, wins) in [
            ("w4a8", "lrq"),
            ("w3a8", "brecq"),
            ("w2a8", "talr"),
            ("w2a4", "brecq"),
            ("w2a2", "talr"),
            ("w8a8", "none"),
            ("wfp4a8", "latent"),
            ("we2m3a8", "none"),
            ("w4a4", "brecq"),
            ("w2a16g32", "lora-rounding"),
        ] {
            let scheme = Scheme::parse(scheme).unwrap();
            assert_eq!(resolved("auto{batch=2}", &scheme), format!("{wins}{{batch=2}}"));
            assert_eq!(
                (resolved("auto", &scheme).as_str(), resolved("automatic", &scheme).as_str()),
                (wins, "automatic")
            );
        }
        assert_eq!(with_leanings("a, round-in-order{refit=3}", "latent"), "a, round-in-order{lean=1, refit=3}");
        let kept = [
            ("round-in-order", "latent{codes=0}"),
            ("round-in-order{lean=0}", "latent"),
            ("round-in-order", "brecq"),
            ("round", "lrq"),
        ];
        for (text, method) in kept {
            assert_eq!(with_leanings(text, method), text);
        }
        assert_eq!(with_distillation("a, round", "latent{batch=2}"), "a, round\n, distill{learn=latent, batch=2}");
        let budgeted = with_allocation(text, Some(4.5), None, None);
        assert!(budgeted.contains("min-max}, allocate-bits{budget=4.5}, round, correct-bias"), "{budgeted}");
        let both = with_allocation(
            "# assign-encodings\nassign-encodings {weights=min-max}, round",
            Some(5.0),
            Some(0.1),
            Some("fisher"),
        );
        let want = "# assign-encodings\nassign-encodings {weights=min-max}, \
                    allocate-bits{budget=5, max-drop=0.1, metric=fisher, weights=min-max}, round";
        assert_eq!(both, want);
        assert_eq!(with_allocation(&both, Some(3.0), None, None), both, "what is there stays");
        assert_eq!(with_allocation(text, None, None, Some("fisher")), text);
        assert!(with_rounding(&gptq, "nearest").contains(", round{method=nearest}, correct-bias"));
    }
}
