//! Facts that passes require, establish and preserve.

/// A set of facts about a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts(u32);

const NAMES: &[(Facts, &str)] = &[
    (Facts::SHAPES, "shapes"),
    (Facts::CALIBRATED, "calibrated"),
    (Facts::ENCODED, "encoded"),
    (Facts::ROUNDED, "rounded"),
];

impl Facts {
    /// None.
    pub const NONE: Self = Self(0);
    /// Types are inferred as far as they follow.
    pub const SHAPES: Self = Self(1);
    /// What was wished for was measured.
    pub const CALIBRATED: Self = Self(1 << 1);
    /// Every decision about encodings is made.
    pub const ENCODED: Self = Self(1 << 2);
    /// Every encoded constant has codes.
    pub const ROUNDED: Self = Self(1 << 3);
    /// All.
    pub const ALL: Self = Self(u32::MAX);

    /// Both sets.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What both have.
    #[must_use]
    pub const fn only(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What `self` has and `other` has not.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether all of `other` hold.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether none holds.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = NAMES.iter().filter(|(fact, _)| self.contains(*fact)).map(|(_, name)| *name).collect();
        f.write_str(if names.is_empty() { "nothing" } else { "" })?;
        f.write_str(&names.join(", "))
    }
}
