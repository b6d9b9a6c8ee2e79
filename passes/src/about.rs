//! What every listed thing says about itself.

/// Name, documentation and source of a pass, rounding, grid, target or observer. The catalogue, `explain` and the
/// README tables print these very words.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// The name in recipes, on the command line and in file names.
    pub name: &'static str,
    /// The documentation, Markdown, first line a summary.
    pub doc: &'static str,
    /// Paper and section, or specification and version.
    pub source: &'static str,
}

impl About {
    /// The first sentence of the documentation, on one line.
    pub fn summary(&self) -> String {
        let first: Vec<&str> = self.doc.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
        let paragraph = first.join(" ");
        match paragraph.find(". ") {
            Some(end) => paragraph[..=end].to_owned(),
            None => paragraph,
        }
    }
}

/// Declares `static INFO: PassInfo`, its documentation taken from the doc comment.
#[macro_export]
macro_rules! declare_pass {
    (
        $(#[doc = $doc:literal])+
        INFO {
            name: $name:literal,
            source: $source:literal,
            cost: $cost:literal,
            requires: $requires:expr,
            establishes: $establishes:expr,
            preserves: $preserves:expr,
            fidelity: $fidelity:ident,
            options: $options:expr $(,)?
        }
    ) => {
        $(#[doc = $doc])+
        pub(crate) static INFO: $crate::pass::PassInfo = $crate::pass::PassInfo {
            about: $crate::about::About {
                name: $name,
                doc: concat!($($doc, "\n"),+),
                source: $source,
            },
            cost: $cost,
            requires: $requires,
            establishes: $establishes,
            preserves: $preserves,
            fidelity: $crate::pass::Fidelity::$fidelity,
            options: $options,
        };
    };
}
