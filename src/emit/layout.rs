//! How weights are folded onto hardware, and written.

use std::str::FromStr;

/// How a memory is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryFormat {
    /// `$readmemh` of Verilog, one word a line; also what Vivado's XPM memories read.
    Mem,
    /// The same for FINN's decoupled weights: digits for a multiple of four bits.
    Dat,
    /// Coefficients of Xilinx' memory generators.
    Coe,
    /// Intel's memory initialization file.
    Mif,
    /// Intel HEX, addresses counting words as Quartus has it.
    Hex,
}

impl MemoryFormat {
    /// Every format with the ending of its files.
    pub const ALL: [(Self, &'static str); 5] =
        [(Self::Mem, "mem"), (Self::Dat, "dat"), (Self::Coe, "coe"), (Self::Mif, "mif"), (Self::Hex, "hex")];

    pub(super) fn ending(self) -> &'static str {
        Self::ALL.iter().find(|(format, _)| *format == self).map_or("mem", |(_, ending)| ending)
    }
}

/// How weights are folded onto hardware, and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Output channels at once.
    pub pe: usize,
    /// Inputs at once.
    pub simd: usize,
    /// How words are written.
    pub formats: Vec<MemoryFormat>,
}

impl Default for Layout {
    fn default() -> Self {
        Self { pe: 1, simd: 1, formats: vec![MemoryFormat::Mem] }
    }
}

/// The most lanes of a word.
const MOST_LANES: usize = 4096;

/// The most bytes of a record of Intel HEX.
const MOST_BYTES: usize = 255;

impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut layout = Self { formats: Vec::new(), ..Self::default() };
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let lanes = |n: &str| {
                let n = n.parse().ok().filter(|n: &usize| (1..=MOST_LANES).contains(n));
                n.ok_or_else(|| format!("`{part}` is no number of lanes from 1 to {MOST_LANES}"))
            };
            match part.split_once('=') {
                Some(("pe", n)) => layout.pe = lanes(n)?,
                Some(("simd", n)) => layout.simd = lanes(n)?,
                Some(("format", name)) => {
                    let found = MemoryFormat::ALL.iter().find(|(_, ending)| *ending == name);
                    let (format, _) = found.ok_or_else(|| format!("`{name}` is none of mem, dat, coe, mif, hex"))?;
                    if !layout.formats.contains(format) {
                        layout.formats.push(*format);
                    }
                }
                _ => return Err(format!("`{part}`: write pe=4,simd=8,format=mem,format=coe")),
            }
        }
        if layout.pe * layout.simd > MOST_LANES {
            return Err(format!("{} x {} lanes are more than {MOST_LANES}", layout.pe, layout.simd));
        }
        if layout.formats.contains(&MemoryFormat::Hex) && layout.pe * layout.simd > MOST_BYTES {
            return Err(format!("a record of Intel HEX holds {MOST_BYTES} bytes: fewer lanes, or another format"));
        }
        if layout.formats.is_empty() {
            layout.formats.push(MemoryFormat::Mem);
        }
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read() {
        let layout: Layout = "pe=4,simd=8,format=coe,format=mif".parse().unwrap();
        assert_eq!((layout.pe, layout.simd, layout.formats.len()), (4, 8, 2));
        assert!("pe=0".parse::<Layout>().is_err() && "pe=4096,simd=2".parse::<Layout>().is_err());
        assert_eq!("format=mem,format=mem".parse::<Layout>().unwrap().formats.len(), 1);
        assert!("pe=16,simd=32,format=hex".parse::<Layout>().is_err() && "pe=16,simd=32".parse::<Layout>().is_ok());
        assert!("format=bin".parse::<Layout>().is_err() && "four".parse::<Layout>().is_err());
    }
}
