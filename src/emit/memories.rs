//! Weights as the memories of a circuit: words of PE x SIMD lanes, in the text forms that simulators and vendors read.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use passes::encoding::{self, Encoding};
use passes::id::Site;
use passes::model::Model;
use passes::ops;
use serde_json::{Value, json};

use super::layout::{Layout, MemoryFormat};
use super::packed::hex;

/// One encoded constant of a linear node, in words.
pub(super) struct Memory {
    name: String,
    node: String,
    role: &'static str,
    bits: u32,
    signed: bool,
    lanes: (usize, usize),
    scale: Vec<f32>,
    shape: Vec<usize>,
    /// Each a word, the least significant byte first.
    words: Vec<Vec<u8>>,
}

/// The memories of `model`: weights folded as `layout` says, biases with one lane.
///
/// # Errors
/// A weight that memories do not hold as it is: one with zero points, or of a transposed convolution.
pub(super) fn of(model: &Model, layout: &Layout) -> Result<Vec<Memory>, String> {
    let graph = model.graph();
    let mut memories = Vec::new();
    let mut taken = BTreeSet::new();
    for (id, node) in graph.nodes() {
        let Some(roles) = ops::linear(graph, id) else { continue };
        let name = plain(&node.name, &mut taken);
        let roles_of = [(Some(roles.weight), "weight"), (roles.bias, "bias")];
        for (input, role) in roles_of.into_iter().filter_map(|(input, role)| Some((input?, role))) {
            let site = Site::Use { node: id, input };
            let (Some(encoding), Some(codes)) = (model.plan().encoding(site), model.plan().codes(site)) else {
                continue;
            };
            if !encoding.grid.info().integer {
                continue;
            }
            let refuse = |why: &str| Err(format!("the {role} of node `{}` {why}", node.name));
            if !encoding.is_symmetric() {
                return refuse("has zero points, which memories do not hold: quantize with --target rtl-mem");
            }
            if node.op.is("ConvTranspose") {
                return refuse("is that of a ConvTranspose, which has no folding here");
            }
            let codes_of = signed_codes(encoding, codes);
            let rows = if role == "weight" { codes.shape()[roles.out_axis] } else { codes.len() };
            let columns = codes.len().checked_div(rows).unwrap_or(0);
            let transposed = role == "weight" && roles.out_axis != 0;
            let at = |row: usize, column: usize| {
                codes_of[if transposed { column * rows + row } else { row * columns + column }]
            };
            let lanes = if role == "weight" { (layout.pe, layout.simd) } else { (1, 1) };
            let bits = encoding.grid.info().bits;
            memories.push(Memory {
                name: format!("{name}.{role}"),
                node: node.name.to_string(),
                role,
                bits,
                signed: encoding.grid.range().0 < 0.0,
                lanes,
                scale: encoding.scale.to_vec(),
                shape: codes.shape().to_vec(),
                words: fold((rows, columns), lanes, bits, at),
            });
        }
    }
    Ok(memories)
}

/// The most characters of a name that come from the model: file systems allow 255 bytes.
const LONGEST: usize = 120;

/// A name out of a node's that files and C can have, and that is not `taken`.
fn plain(name: &str, taken: &mut BTreeSet<String>) -> String {
    let name: String = name.chars().take(LONGEST).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let name = name.trim_matches('_');
    let name = if name.starts_with(|c: char| c.is_ascii_alphabetic()) { name.to_owned() } else { format!("n{name}") };
    let mut numbered = (2..).map(|n: u32| format!("{name}_{n}"));
    let mut free = name.clone();
    while !taken.insert(free.clone()) {
        free = numbered.next().unwrap_or_default();
    }
    free
}

/// Codes as numbers.
#[expect(clippy::cast_possible_truncation, reason = "codes of up to 32 bits")]
fn signed_codes(encoding: &Encoding, codes: &passes::tensor::Tensor) -> Vec<i64> {
    encoding::unpack(codes).into_iter().map(|code| encoding.grid.decode(code) as i64).collect()
}

/// The words of a matrix: row r goes to PE r mod `pe`, word (r div pe) * (columns / simd) + s; lane 0 of PE 0 lies in the lowest bits. What
/// does not fill a word is padded with zeros.
fn fold(
    (rows, columns): (usize, usize),
    (pe, simd): (usize, usize),
    bits: u32,
    at: impl Fn(usize, usize) -> i64,
) -> Vec<Vec<u8>> {
    let bits = bits as usize;
    let bytes = (pe * simd * bits).div_ceil(8);
    let word = |block: usize, group: usize| {
        let mut word = vec![0_u8; bytes];
        for (p, s) in (0..pe).flat_map(|p| (0..simd).map(move |s| (p, s))) {
            let (row, column) = (block * pe + p, group * simd + s);
            if row >= rows || column >= columns {
                continue;
            }
            let code = at(row, column).cast_unsigned();
            let lane = (p * simd + s) * bits;
            (0..bits)
                .filter(|bit| code >> bit & 1 == 1)
                .for_each(|bit| word[(lane + bit) / 8] |= 1 << ((lane + bit) % 8));
        }
        word
    };
    let groups = columns.div_ceil(simd);
    (0..rows.div_ceil(pe))
        .flat_map(|block| (0..groups).map(move |group| (block, group)))
        .map(|(b, g)| word(b, g))
        .collect()
}

impl Memory {
    fn width(&self) -> usize {
        self.lanes.0 * self.lanes.1 * self.bits as usize
    }

    /// The files of this memory.
    pub(super) fn files(&self, layout: &Layout) -> Vec<(String, String)> {
        let file = |format: &MemoryFormat| (format!("{}.{}", self.name, format.ending()), self.text(*format));
        layout.formats.iter().map(file).collect()
    }

    fn text(&self, format: MemoryFormat) -> String {
        let digits = self.width().div_ceil(4);
        let words: Vec<String> = self.words.iter().map(|word| digits_of(word, digits)).collect();
        match format {
            MemoryFormat::Mem | MemoryFormat::Dat => words.join("\n") + "\n",
            MemoryFormat::Coe => {
                format!("memory_initialization_radix=16;\nmemory_initialization_vector=\n{};\n", words.join(",\n"))
            }
            MemoryFormat::Mif => {
                let mut text = format!(
                    "WIDTH={};\nDEPTH={};\nADDRESS_RADIX=HEX;\nDATA_RADIX=HEX;\nCONTENT BEGIN\n",
                    self.width(),
                    words.len()
                );
                for (at, word) in words.iter().enumerate() {
                    let _ = writeln!(text, "{at:X} : {word};");
                }
                text + "END;\n"
            }
            MemoryFormat::Hex => intel_hex(&self.words),
        }
    }

    /// What a reader of `file` must know.
    pub(super) fn entry(&self, file: &str, text: &str) -> Value {
        json!({
            "file": file,
            "node": self.node,
            "role": self.role,
            "bits": self.bits,
            "signed": self.signed,
            "shape": self.shape,
            "scale": self.scale,
            "word_bits": self.width(),
            "words": self.words.len(),
            "pe": self.lanes.0,
            "simd": self.lanes.1,
            "lane_order": "lane 0 of PE 0 in the lowest bits, SIMD inside PE",
            "address_order": "outputs in blocks of PE, inputs in groups of SIMD inside",
            "padding": 0,
            "sha256": hex(text.as_bytes()),
        })
    }
}

/// The lowest `digits` hexadecimal digits of `word`, whose least significant byte comes first.
fn digits_of(word: &[u8], digits: usize) -> String {
    let digit = |at: usize| word.get(at / 2).map_or(0, |byte| byte >> (4 * (at % 2)) & 15);
    (0..digits).rev().filter_map(|at| char::from_digit(digit(at).into(), 16)).collect()
}

/// Intel HEX in which addresses count words, each a record with its most significant byte first.
fn intel_hex(words: &[Vec<u8>]) -> String {
    let mut text = String::new();
    let mut record = |address: usize, kind: u8, data: &[u8]| {
        let [high, low] = u16::try_from(address & 0xffff).unwrap_or(0).to_be_bytes();
        let length = u8::try_from(data.len()).unwrap_or(u8::MAX);
        let all: Vec<u8> = [&[length, high, low, kind][..], data].concat();
        let sum = all.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        text.push(':');
        for byte in all.iter().chain([&sum.wrapping_neg()]) {
            let _ = write!(text, "{byte:02X}");
        }
        text.push('\n');
    };
    let mut page = 0;
    for (address, word) in words.iter().enumerate() {
        if address >> 16 != page {
            page = address >> 16;
            record(0, 4, &u16::try_from(page).unwrap_or(u16::MAX).to_be_bytes());
        }
        let data: Vec<u8> = word.iter().rev().copied().collect();
        record(address, 0, &data);
    }
    record(0, 1, &[]);
    text
}

/// The same codes as arrays of C, with their scales.
///
/// # Errors
/// As [`of`].
pub(super) fn header(model: &Model) -> Result<String, String> {
    let mut text = String::from("/* Codes and scales of the weights; value = code * scale. */\n#include <stdint.h>\n");
    for memory in of(model, &Layout::default())? {
        let width = [8, 16].into_iter().find(|width| memory.bits <= *width).unwrap_or(32);
        let sign = if memory.signed { "" } else { "u" };
        let name = memory.name.replace('.', "_");
        let codes: Vec<String> = memory.words.iter().map(|word| memory.number(word).to_string()).collect();
        let scales: Vec<String> = memory.scale.iter().map(|scale| format!("{scale:e}f")).collect();
        let _ = writeln!(
            text,
            "\n/* {} of {}, {} bits, [outputs][inputs] of {:?} */\nstatic const {sign}int{width}_t {name}[{}] = {{{}}};\nstatic const \
             float {name}_scale[{}] = {{{}}};",
            memory.role,
            memory.node.replace("*/", "* /").escape_debug(),
            memory.bits,
            memory.shape,
            codes.len(),
            codes.join(","),
            scales.len(),
            scales.join(",")
        );
    }
    Ok(text)
}

impl Memory {
    /// The one code that `word` holds.
    fn number(&self, word: &[u8]) -> i64 {
        let code = word.iter().rev().fold(0_i64, |code, byte| code << 8 | i64::from(*byte));
        let negative = self.signed && code >> (self.bits - 1) & 1 == 1;
        if negative { code - (1 << self.bits) } else { code }
    }
}

pub(super) fn manifest(target: &str, layout: &Layout, entries: &[Value]) -> Value {
    json!({
        "version": 1,
        "tool": { "name": "onnx-quant", "version": env!("CARGO_PKG_VERSION") },
        "target": target,
        "pe": layout.pe,
        "simd": layout.simd,
        "memories": entries,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_folded_as_finn_folds_them() {
        // Rows 0 to 2, columns 0 to 3; code = 10 row + column, 8 bits, two PEs of two lanes; row 3 is padding.
        let words = fold((3, 4), (2, 2), 8, |row, column| i64::try_from(10 * row + column).unwrap());
        assert_eq!(words, [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 0, 0], [22, 23, 0, 0]]);
        // Codes of 3 bits cross bytes, negative ones in two's complement: -1 = 7, 3, -4 = 4.
        let words = fold((1, 3), (1, 3), 3, |_, column| [-1, 3, -4][column]);
        assert_eq!(words, [[0b0001_1111, 0b1]]);
        assert_eq!(digits_of(&words[0], 3), "11f");
    }

    #[test]
    fn formats_are_those_of_their_readers() {
        let memory = Memory {
            name: "w".into(),
            node: "w".into(),
            role: "weight",
            bits: 8,
            signed: true,
            lanes: (1, 2),
            scale: vec![0.5],
            shape: vec![1, 4],
            words: vec![vec![0x01, 0xff], vec![0x7f, 0x80]],
        };
        assert_eq!(memory.text(MemoryFormat::Mem), "ff01\n807f\n");
        assert!(memory.text(MemoryFormat::Coe).ends_with("vector=\nff01,\n807f;\n"));
        assert!(
            memory.text(MemoryFormat::Mif).contains("WIDTH=16;\nDEPTH=2;")
                && memory.text(MemoryFormat::Mif).contains("1 : 807f;")
        );
        // Byte sums: 02+00+00+00+FF+01 = 102, so FE; 02+00+01+00+80+7F = 102, so FE.
        assert_eq!(memory.text(MemoryFormat::Hex), ":02000000FF01FE\n:02000100807FFE\n:00000001FF\n");
    }

    #[test]
    fn names_are_those_of_files_and_of_c() {
        let mut taken = BTreeSet::new();
        let names = ["/0/Conv", "a.b", "a/b", "..", "a b"].map(|name| plain(name, &mut taken));
        assert_eq!(names, ["n0_Conv", "a_b", "a_b_2", "n", "a_b_3"]);
    }
}
