//! The text form: prints and parses; for goldens, bug reports and `cat`.
//!
//! ```text
//! opset 21
//! graph (%x: f32[batch,2]) -> (%y: f32[batch,2]) {
//!   %w = const f32[2,2] [1, 0, 0, 1]
//!   %y = Gemm(%x, %w, _) {transB=1}
//! }
//! ```
//!
//! Values are `%name`, quoted where the name has other characters than letters, digits and `_ . / : -`; `_` is an input or
//! output left out. Operators outside ai.onnx are `domain::Name`. A node name follows as `@name` where it is not the one
//! that import would make up. Attributes: whole numbers, numbers with a point or exponent, "strings", lists, `const …`
//! tensors and `graph …` bodies. Constants of up to 64 elements are written out, larger ones as `digest`, which reads back
//! as an error; in inputs `splat(0.1)` and `rand(seed=7, std=0.05)` fill any size.
//!
//! Types of inner values are not printed: they follow from the operators.

mod lex;
mod parse;
mod print;

pub use parse::{ParseError, parse};
pub use print::{graph, plan};

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(text: &str) -> String {
        let model = parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        graph(&model)
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let text = r#"opset 21
opset com.microsoft 1
graph (%x: f32[batch,2,?], %"odd name": i64[]) -> (%y: f32[batch,2,4], %z: bool) {
  %w   = const f32[2,2] [1, -0.5, 1e-20, inf]
  %i   = const i64[2] [-1, 9223372036854775807]
  %f   = const bool[2] [true, false]
  %s   = const string[1] ["a\"b"]
  %n   = const i4[3] hex(e107)
  %a, _, %b = com.microsoft::Odd(%x, _, %w) {alpha=1.5, axes=[1, 2], empty=[], fs=[1.0, 2.5], mode="linear", t=const f32[] [3]} @"node 1"
  %y   = Add(%a, %i)
  %z   = If(%f) {else_branch=graph () -> (%e) {
    %e = Identity(%b)
  }, then_branch=graph () -> (%t: f32) {
    %c = const f32[1] [2]
    %t = Add(%b, %c)
  }}
  %unread = Tanh(%y) @twice
  %"colon:" = Tanh(%unread)
}
"#;
        let once = round_trip(text);
        assert_eq!(round_trip(&once), once);
        assert!(once.contains("@\"node 1\"") && once.contains("graph () -> (%t: f32)"), "{once}");
    }

    #[test]
    fn errors_name_their_place() {
        let error = |text: &str| parse(text).map(|_| ()).unwrap_err().to_string();
        assert!(error("graph () -> (%y) {\n  %y = Relu(%x)\n}").contains("`x`"));
        let at = error("graph () -> () {\n  %w = const f32[2] [1]\n}");
        assert!(at.starts_with("line 2") && at.contains('2'), "{at}");
        assert!(error("graph (%x: f33[1]) -> () {}").contains("f33"));
        assert!(error("graph () -> () {\n  %a = Relu(%b)\n  %b = Relu(%a)\n}").contains("cycle"));
        assert!(error(&"graph () -> () { %a = If() {b=".repeat(200)).contains("deep"));
        assert!(error("graph () -> () {\n  %w = const f32[1000000000,1000000000] splat(1)\n}").contains("large"));
    }
}
