//! Options of passes, as written in pipeline text: `calibrate{observer=percentile, keep=0.9999}`.

use std::collections::BTreeMap;

/// One option that a pass understands.
#[derive(Clone, Copy, Debug)]
pub struct OptionInfo {
    /// Its name.
    pub name: &'static str,
    /// What it sets, and the default.
    pub doc: &'static str,
}

/// The options given to a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(pub(crate) BTreeMap<String, String>);

/// An option that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("option `{option}`: {problem}")]
pub struct OptionError {
    /// Which.
    pub option: String,
    /// What is wrong, with what would be right.
    pub problem: String,
}

impl Options {
    /// The text of `name`, or `default`.
    pub fn text<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.0.get(name).map_or(default, String::as_str)
    }

    /// The number `name`, where given.
    ///
    /// # Errors
    /// [`OptionError`] when it is no finite number.
    pub fn number(&self, name: &str) -> Result<Option<f64>, OptionError> {
        let Some(text) = self.0.get(name) else { return Ok(None) };
        match text.parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Some(value)),
            _ => Err(OptionError { option: name.to_owned(), problem: format!("`{text}` is not a number") }),
        }
    }

    /// The whole number `name`, or `default`.
    ///
    /// # Errors
    /// [`OptionError`] when it is none, or is over a thousand.
    pub fn count(&self, name: &str, default: usize) -> Result<usize, OptionError> {
        let Some(text) = self.0.get(name) else { return Ok(default) };
        text.parse().ok().filter(|&n| n <= 1000).ok_or_else(|| OptionError {
            option: name.to_owned(),
            problem: format!("`{text}` is not a whole number up to 1000"),
        })
    }

    /// Refuses what `known` does not list.
    pub(crate) fn check(&self, known: &[OptionInfo]) -> Result<(), OptionError> {
        match self.0.keys().find(|key| !known.iter().any(|option| option.name == **key)) {
            Some(key) => {
                let names: Vec<&str> = known.iter().map(|option| option.name).collect();
                let problem = if names.is_empty() {
                    "this pass takes no options".to_owned()
                } else {
                    format!("unknown; this pass takes {}", names.join(", "))
                };
                Err(OptionError { option: key.clone(), problem })
            }
            None => Ok(()),
        }
    }
}
