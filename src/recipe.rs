//! The text of the pipeline: the target's, changed by what the user asked for.

use crate::driver::Request;

/// What will run for `request`.
pub(crate) fn pipeline_text(request: &Request) -> String {
    let text =
        request.pipeline.clone().unwrap_or_else(|| request.target.pipeline(request.goal, &request.scheme).into_owned());
    let text = request.observer.as_ref().map_or(text.clone(), |observer| with_observer(&text, observer));
    let text = request.rounding.as_ref().map_or(text.clone(), |method| with_rounding(&text, method));
    allocation(request).map_or(text.clone(), |allocation| with_allocation(&text, &allocation))
}

/// The pass that gives weights their bits, where the user asked for it.
fn allocation(request: &Request) -> Option<String> {
    // Where weights have eight bits already, all that helps is float.
    let raises = request.scheme.weight_format.is_none() && request.scheme.weight_bits < 8;
    let max_drop = request.max_drop.filter(|_| raises || request.budget.is_some());
    let options = [("budget", request.budget), ("max-drop", max_drop)];
    let given: Vec<String> = options.iter().filter_map(|(name, value)| Some(format!("{name}={}", (*value)?))).collect();
    (!given.is_empty()).then(|| format!("allocate-bits{{{}}}", given.join(", ")))
}

/// `text` with `allocation` right after `assign-encodings`.
fn with_allocation(text: &str, allocation: &str) -> String {
    const BEFORE: &str = "assign-encodings";
    let Some(at) = text.find(BEFORE) else { return format!("{text}, {allocation}") };
    let rest = &text[at + BEFORE.len()..];
    let options = if rest.starts_with('{') { rest.find('}').map_or(rest.len(), |end| end + 1) } else { 0 };
    let (before, after) = text.split_at(at + BEFORE.len() + options);
    format!("{before}, {allocation}{after}")
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
    if let Some((before, after)) = text.split_once("round-in-order") {
        return match after.strip_prefix('{') {
            Some(rest) => format!("{before}round-in-order{{method={method}, {rest}"),
            None => format!("{before}round-in-order{{method={method}}}{after}"),
        };
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
        let budgeted = with_allocation(text, "allocate-bits{budget=4.5}");
        assert!(budgeted.contains("min-max}, allocate-bits{budget=4.5}, round, correct-bias"), "{budgeted}");
        assert_eq!(with_allocation("a, assign-encodings, round", "b"), "a, assign-encodings, b, round");
        assert!(with_rounding(&gptq, "nearest").contains(", round{method=nearest}, correct-bias"));
    }
}
