//! Pipelines and their text form.
//!
//! ```text
//! infer-shapes, *(eliminate-identity, fold-batch-norm),   # until stable
//! calibrate{observer=percentile, keep=0.9999}, assign-encodings, round
//! ```
//!
//! Comma-separated steps; `*( … )` repeats its passes until none of them changes anything; `{name=value, …}` gives
//! options; `#` starts a comment.

use super::{Facts, Options, Pass, PassEntry};

/// A sequence of steps.
#[derive(Debug, Default)]
pub struct Pipeline {
    /// In order.
    pub steps: Vec<Step>,
}

/// One step.
#[derive(Debug)]
pub enum Step {
    /// A pass, once (a sweeping pass repeats itself until it finds nothing).
    Once(Box<dyn Pass>),
    /// Passes, in turn, until none changes anything.
    UntilStable(Vec<Box<dyn Pass>>),
}

impl Step {
    fn measures(&self) -> bool {
        matches!(self, Self::Once(pass) if pass.info().establishes.contains(Facts::CALIBRATED))
    }
}

/// Text that is no pipeline.
#[derive(Debug, thiserror::Error)]
#[error("pipeline, at character {at}: {problem}")]
pub struct PipelineError {
    /// Where, counted from 1.
    pub at: usize,
    /// What is wrong.
    pub problem: String,
}

impl Pipeline {
    /// Parses `text` against `catalogue`.
    ///
    /// # Errors
    /// [`PipelineError`] for a syntax error, an unknown pass (with the nearest name) or a bad option.
    pub fn parse(text: &str, catalogue: &[&'static PassEntry]) -> Result<Self, PipelineError> {
        let mut parser = Parser { text: text.chars().collect(), at: 0, catalogue };
        let mut steps = Vec::new();
        while parser.peek().is_some() {
            steps.push(parser.step()?);
            if !parser.eat(',') && parser.peek().is_some() {
                return Err(parser.fail("expected `,` between steps"));
            }
        }
        Ok(Self { steps })
    }

    /// Follows the facts through the steps.
    ///
    /// # Errors
    /// The first requirement that nothing before it meets, and who in `catalogue` could.
    pub fn check(&self, given: Facts, catalogue: &[&PassEntry]) -> Result<Facts, PipelineError> {
        let mut facts = given;
        for pass in self.passes() {
            let info = pass.info();
            let missing = info.requires.without(facts);
            if !missing.is_empty() {
                let able = catalogue.iter().find(|e| !e.info.establishes.only(missing).is_empty());
                let hint = able.map_or(String::new(), |e| format!("; put `{}` before it", e.info.about.name));
                let problem = format!("`{}` needs the model to be {missing}{hint}", info.about.name);
                return Err(PipelineError { at: 1, problem });
            }
            facts = facts.only(info.preserves).and(info.establishes);
        }
        Ok(facts)
    }

    /// The steps before the first that measures, and the rest.
    pub fn split_at_calibration(mut self) -> (Self, Self) {
        let at = self.steps.iter().position(Step::measures).unwrap_or(self.steps.len());
        let rest = self.steps.split_off(at);
        (self, Self { steps: rest })
    }

    /// The steps behind the last that measures; all where none does.
    #[must_use]
    pub fn after_last_calibration(mut self) -> Self {
        let from = self.steps.iter().rposition(Step::measures).map_or(0, |at| at + 1);
        Self { steps: self.steps.split_off(from) }
    }

    /// Every pass, in order, repeated groups once.
    pub fn passes(&self) -> impl Iterator<Item = &dyn Pass> {
        self.steps.iter().flat_map(|step| match step {
            Step::Once(pass) => std::slice::from_ref(pass).iter().map(AsRef::as_ref),
            Step::UntilStable(passes) => passes.iter().map(AsRef::as_ref),
        })
    }
}

struct Parser<'a> {
    text: Vec<char>,
    at: usize,
    catalogue: &'a [&'static PassEntry],
}

impl Parser<'_> {
    fn fail(&self, problem: impl Into<String>) -> PipelineError {
        PipelineError { at: self.at + 1, problem: problem.into() }
    }

    /// The next character that is neither blank nor comment.
    fn peek(&mut self) -> Option<char> {
        loop {
            match self.text.get(self.at) {
                Some('#') => {
                    while self.text.get(self.at).is_some_and(|c| *c != '\n') {
                        self.at += 1;
                    }
                }
                Some(c) if c.is_whitespace() => self.at += 1,
                other => return other.copied(),
            }
        }
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: char) -> Result<(), PipelineError> {
        if self.eat(wanted) { Ok(()) } else { Err(self.fail(format!("expected `{wanted}`"))) }
    }

    fn word(&mut self) -> Result<String, PipelineError> {
        self.run_of("-_.+", "a name")
    }

    /// The value of an option, which may be a pattern of names of nodes.
    fn value(&mut self) -> Result<String, PipelineError> {
        self.run_of("-_.+*/:", "a value")
    }

    /// Letters, digits and characters of `others`, as many as there are; `what` is expected.
    fn run_of(&mut self, others: &str, what: &str) -> Result<String, PipelineError> {
        self.peek();
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|c| !(c.is_alphanumeric() || others.contains(*c))).unwrap_or(rest.len());
        if end == 0 {
            return Err(self.fail(format!("expected {what}")));
        }
        self.at += end;
        Ok(rest[..end].iter().collect())
    }

    fn step(&mut self) -> Result<Step, PipelineError> {
        if !self.eat('*') {
            return self.pass().map(Step::Once);
        }
        self.expect('(')?;
        let mut passes = Vec::new();
        while !self.eat(')') {
            passes.push(self.pass()?);
            if !self.eat(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(Step::UntilStable(passes))
    }

    fn pass(&mut self) -> Result<Box<dyn Pass>, PipelineError> {
        let start = self.at;
        let name = self.word()?;
        let Some(entry) = self.catalogue.iter().find(|entry| entry.info.about.name == name) else {
            self.at = start;
            let names = self.catalogue.iter().map(|entry| entry.info.about.name);
            let near = nearest(&name, names).map_or(String::new(), |near| format!("; did you mean `{near}`?"));
            return Err(self.fail(format!("there is no pass `{name}`{near}")));
        };
        let options = self.options()?;
        let fail = |e: super::OptionError| PipelineError { at: start + 1, problem: format!("`{name}`: {e}") };
        options.check(entry.info.options).map_err(fail)?;
        (entry.build)(&options).map_err(fail)
    }

    fn options(&mut self) -> Result<Options, PipelineError> {
        let mut options = Options::default();
        if !self.eat('{') {
            return Ok(options);
        }
        while !self.eat('}') {
            let name = self.word()?;
            self.expect('=')?;
            let value = self.value()?;
            if options.0.insert(name.clone(), value).is_some() {
                return Err(self.fail(format!("option `{name}` is given twice")));
            }
            if !self.eat(',') {
                self.expect('}')?;
                break;
            }
        }
        Ok(options)
    }
}

/// The candidate that differs least from `name`, when it is near enough to be a typing error.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let best = candidates.map(|candidate| (distance(name, candidate), candidate)).min_by_key(|(d, _)| *d)?;
    (best.0 <= 1 + name.chars().count() / 3).then_some(best.1)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
