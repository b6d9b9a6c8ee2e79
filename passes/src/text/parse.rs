//! Parsing.

use std::sync::Arc;

use bytes::Bytes;

use super::lex::{Placed, Token, tokens};
use crate::id::{Name, ValueId};
use crate::ir::{Attr, Attrs, Body, Builder, Dim, Graph, Node, OpKey, TensorType, Type};
use crate::model::{Metadata, Model};
use crate::tensor::{DType, Tensor, count};

/// Text that is no model.
#[derive(Debug, thiserror::Error)]
#[error("line {line}, column {column}: {problem}")]
pub struct ParseError {
    /// Counted from 1.
    pub line: u32,
    /// Counted from 1.
    pub column: u32,
    /// What is wrong.
    pub problem: String,
}

/// Graphs inside graphs deeper than this are refused.
const MAX_DEPTH: usize = 16;
/// Elements that `splat` and `rand` may make.
const MAX_ELEMENTS: usize = 1 << 26;

/// The model that `text` says; see [`super`] for the grammar.
///
/// # Errors
/// [`ParseError`] with its place.
pub fn parse(text: &str) -> Result<Model, ParseError> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0, meta: Metadata::default() };
    while parser.eat_word("opset") {
        let first = parser.word()?;
        let (domain, version) = match first.parse::<u32>() {
            Ok(version) => (String::new(), version),
            Err(_) => (first, parser.number()?),
        };
        parser.meta.opsets.insert(domain.into(), version);
    }
    if parser.meta.opsets.is_empty() {
        parser.meta.opsets.insert("".into(), 21);
    }
    let builder = parser.graph(0)?;
    if parser.at < parser.tokens.len() {
        return Err(parser.fail("nothing may follow the graph"));
    }
    let fail = |problem: String| ParseError { line: 1, column: 1, problem };
    let graph = builder.finish().map_err(|e| fail(e.to_string()))?;
    Model::new(graph, parser.meta).map_err(|e| fail(e.to_string()))
}

struct Parser {
    tokens: Vec<Placed>,
    at: usize,
    meta: Metadata,
}

/// One line of a graph.
enum Statement {
    Constant(Name, Arc<Tensor>),
    Node(Node),
}

type Parsed<T> = Result<T, ParseError>;

impl Parser {
    fn fail(&self, problem: impl Into<String>) -> ParseError {
        let place = self.tokens.get(self.at).or(self.tokens.last());
        let (line, column) = place.map_or((1, 1), |p| (p.line, p.column));
        ParseError { line, column, problem: problem.into() }
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|placed| &placed.token)
    }

    fn eat(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(&Token::Mark(mark));
        self.at += usize::from(found);
        found
    }

    fn eat_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(w)) if w == word);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Parsed<()> {
        if self.eat(mark) { Ok(()) } else { Err(self.fail(format!("expected `{mark}`"))) }
    }

    fn word(&mut self) -> Parsed<String> {
        match self.peek() {
            Some(Token::Word(word)) => {
                let word = word.clone();
                self.at += 1;
                Ok(word)
            }
            _ => Err(self.fail("expected a word")),
        }
    }

    fn number<T: std::str::FromStr>(&mut self) -> Parsed<T> {
        let word = self.word()?;
        word.parse().map_err(|_| {
            self.at -= 1;
            self.fail(format!("`{word}` is no such number"))
        })
    }

    /// Items between `open` and `close`, separated by commas.
    fn list<T>(&mut self, open: char, close: char, mut item: impl FnMut(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        self.expect(open)?;
        let mut items = Vec::new();
        while !self.eat(close) {
            items.push(item(self)?);
            if !self.eat(',') {
                self.expect(close)?;
                break;
            }
        }
        Ok(items)
    }

    fn typed_value(&mut self) -> Parsed<(String, Type)> {
        let name = match self.peek() {
            Some(Token::Value(name)) => name.clone(),
            _ => return Err(self.fail("expected a value such as `%x`")),
        };
        self.at += 1;
        let ty = if self.eat(':') { Type::Tensor(self.tensor_type()?) } else { Type::default() };
        Ok((name, ty))
    }

    fn tensor_type(&mut self) -> Parsed<TensorType> {
        let dtype = if self.eat('?') { None } else { Some(self.dtype()?) };
        let shape = match self.peek() {
            Some(Token::Mark('[')) => Some(self.list('[', ']', Self::dim)?),
            _ => None,
        };
        Ok(TensorType::new(dtype, shape))
    }

    fn dtype(&mut self) -> Parsed<DType> {
        let word = self.word()?;
        DType::from_name(&word).ok_or_else(|| {
            self.at -= 1;
            self.fail(format!("`{word}` is no element type"))
        })
    }

    fn dim(&mut self) -> Parsed<Dim> {
        if self.eat('?') {
            return Ok(Dim::Unknown);
        }
        let word = self.word()?;
        Ok(word.parse::<usize>().map_or_else(|_| Dim::Symbol(word.as_str().into()), Dim::Known))
    }

    fn graph(&mut self, depth: usize) -> Parsed<Builder> {
        if depth > MAX_DEPTH {
            return Err(self.fail("graphs inside graphs are too deep"));
        }
        if !self.eat_word("graph") {
            return Err(self.fail("expected `graph`"));
        }
        let mut builder = Builder::new("graph", "");
        for (name, ty) in self.list('(', ')', Self::typed_value)? {
            builder.input(&name, ty).map_err(|e| self.fail(e.to_string()))?;
        }
        self.expect('>')?;
        let outputs = self.list('(', ')', Self::typed_value)?;
        self.expect('{')?;
        while !self.eat('}') {
            let start = self.at;
            let statement = self.statement(&mut builder, depth)?;
            Self::add(&mut builder, statement).map_err(|problem| {
                self.at = start;
                self.fail(problem)
            })?;
        }
        for (name, ty) in outputs {
            let id = builder.output(&name);
            if ty != Type::default() {
                builder.set_type(id, ty);
            }
        }
        Ok(builder)
    }

    /// Adds a statement that was read; what the builder says becomes an error at the start of the statement.
    fn add(builder: &mut Builder, statement: Statement) -> Result<(), String> {
        match statement {
            Statement::Constant(name, tensor) => builder.constant(&name, tensor).map(|_| ()),
            Statement::Node(node) => builder.node(node).map(|_| ()),
        }
        .map_err(|e| e.to_string())
    }

    fn statement(&mut self, builder: &mut Builder, depth: usize) -> Parsed<Statement> {
        let outputs = self.values(builder)?;
        self.expect('=')?;
        if self.eat_word("const") {
            let tensor = Arc::new(self.tensor()?);
            let [Some(output)] = outputs[..] else { return Err(self.fail("a constant has one name")) };
            let name = Arc::clone(&builder.get(output).name);
            return Ok(Statement::Constant(name, tensor));
        }
        let word = self.word()?;
        let (domain, op) = word.split_once("::").unwrap_or(("", &word));
        let opset = self.meta.opsets.get(domain).copied().unwrap_or(1);
        let op = OpKey { domain: domain.into(), name: op.into(), opset };
        self.expect('(')?;
        let inputs =
            if self.eat(')') { Vec::new() } else { self.values(builder).and_then(|v| self.expect(')').map(|()| v))? };
        let (mut attrs, mut bodies) = (Attrs::new(), Vec::new());
        if self.peek() == Some(&Token::Mark('{')) {
            self.list('{', '}', |parser| parser.attribute(builder, depth, &mut attrs, &mut bodies))?;
        }
        let name: Name = match self.peek() {
            Some(Token::Name(name)) => {
                let name = name.as_str().into();
                self.at += 1;
                name
            }
            _ => "".into(),
        };
        Ok(Statement::Node(Node { name, op, inputs, outputs, attrs, bodies, notes: None }))
    }

    /// `%a, _, %b`
    fn values(&mut self, builder: &mut Builder) -> Parsed<Vec<Option<ValueId>>> {
        let mut values = Vec::new();
        loop {
            match self.peek() {
                Some(Token::Value(name)) => values.push(Some(builder.value(name))),
                Some(Token::Word(word)) if word == "_" => values.push(None),
                _ => return Err(self.fail("expected a value such as `%x`, or `_`")),
            }
            self.at += 1;
            if !self.eat(',') {
                return Ok(values);
            }
        }
    }

    fn attribute(
        &mut self,
        outer: &mut Builder,
        depth: usize,
        attrs: &mut Attrs,
        bodies: &mut Vec<Body>,
    ) -> Parsed<()> {
        let name: Name = self.word()?.into();
        self.expect('=')?;
        if matches!(self.peek(), Some(Token::Word(word)) if word == "graph") {
            let graph = self.body(outer, depth + 1)?;
            bodies.push(Body { attr: name, graph });
            return Ok(());
        }
        let value = self.attribute_value()?;
        if attrs.insert(name, value).is_some() {
            return Err(self.fail("an attribute is given twice"));
        }
        Ok(())
    }

    fn body(&mut self, outer: &mut Builder, depth: usize) -> Parsed<Graph> {
        let mut inner = self.graph(depth)?;
        for captured in inner.undefined() {
            let value = outer.value(&captured);
            let ty = outer.get(value).ty.clone();
            inner.capture(&captured, value, ty).map_err(|e| self.fail(e.to_string()))?;
        }
        inner.finish().map_err(|e| self.fail(e.to_string()))
    }

    fn attribute_value(&mut self) -> Parsed<Attr> {
        if self.eat_word("const") {
            return self.tensor().map(|tensor| Attr::Tensor(Arc::new(tensor)));
        }
        if self.eat_word("opaque") {
            return self.hex().map(|bytes| Attr::Opaque(bytes.into()));
        }
        if self.peek() != Some(&Token::Mark('[')) {
            return self.scalar();
        }
        let items = self.list('[', ']', |parser| match parser.peek() {
            Some(Token::Mark('[')) => Err(parser.fail("a list cannot hold a list")),
            _ => parser.attribute_value(),
        })?;
        let all = |pick: fn(&Attr) -> bool| !items.is_empty() && items.iter().all(pick);
        Ok(if all(|a| matches!(a, Attr::Float(_))) {
            Attr::Floats(items.iter().filter_map(|a| if let Attr::Float(v) = a { Some(*v) } else { None }).collect())
        } else if all(|a| matches!(a, Attr::String(_))) {
            Attr::Strings(
                items.into_iter().filter_map(|a| if let Attr::String(v) = a { Some(v) } else { None }).collect(),
            )
        } else if all(|a| matches!(a, Attr::Tensor(_))) {
            Attr::Tensors(
                items.into_iter().filter_map(|a| if let Attr::Tensor(v) = a { Some(v) } else { None }).collect(),
            )
        } else if items.iter().all(|a| matches!(a, Attr::Int(_))) {
            Attr::Ints(items.iter().filter_map(|a| if let Attr::Int(v) = a { Some(*v) } else { None }).collect())
        } else {
            return Err(self.fail("a list must hold one kind of thing"));
        })
    }

    fn scalar(&mut self) -> Parsed<Attr> {
        if let Some(Token::Text(text)) = self.peek() {
            let attr = Attr::text(text);
            self.at += 1;
            return Ok(attr);
        }
        if self.eat_word("hex") {
            return self.hex().map(|bytes| Attr::String(bytes.into()));
        }
        let word = self.word()?;
        if let Ok(value) = word.parse::<i64>() {
            return Ok(Attr::Int(value));
        }
        let value = word.parse::<f32>().map_err(|_| {
            self.at -= 1;
            self.fail(format!("`{word}` is no attribute value"))
        });
        value.map(Attr::Float)
    }

    /// What follows `const`: a type and a payload.
    fn tensor(&mut self) -> Parsed<Tensor> {
        let dtype = self.dtype()?;
        let shape = self.list('[', ']', Parser::number::<usize>)?;
        let elements = count(&shape).filter(|&n| n <= MAX_ELEMENTS);
        let elements = elements.ok_or_else(|| self.fail("this constant is too large"))?;
        if self.eat_word("splat") {
            self.expect('(')?;
            let value: f32 = self.number()?;
            self.expect(')')?;
            return match dtype {
                DType::F32 => Ok(Tensor::of(shape, vec![value; elements])),
                _ => self.codes(dtype, shape, value, elements),
            };
        }
        if self.eat_word("rand") {
            if dtype != DType::F32 {
                return Err(self.fail(format!("only f32 constants can be random, not {}", dtype.name())));
            }
            return Ok(Tensor::of(shape, self.random(elements)?));
        }
        if self.eat_word("hex") {
            let bytes = Bytes::from(self.hex()?);
            return Tensor::new(dtype, shape, bytes).map_err(|e| self.fail(e.to_string()));
        }
        if self.eat_word("digest") {
            return Err(self.fail("this constant was printed as a digest: its values are not in the text"));
        }
        self.written_out(dtype, shape, elements)
    }

    /// `elements` times the whole number `value`, in an integer type of up to 16 bits.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "two's complement is what is wanted")]
    fn codes(&self, dtype: DType, shape: Vec<usize>, value: f32, elements: usize) -> Parsed<Tensor> {
        let bits = dtype.bits() as usize;
        let small = matches!(dtype, DType::I4 | DType::U4 | DType::I2 | DType::U2) || dtype.is_integer() && bits <= 16;
        if !small || value.fract() != 0.0 || value.abs() >= 65536.0 {
            return Err(self.fail(format!("f32 and integers of up to 16 bits can be filled, not {}", dtype.name())));
        }
        let code = value as i32 as u32 & ((1 << bits) - 1);
        let mut bytes = vec![0_u8; (elements * bits).div_ceil(8)];
        for bit in
            (0..elements).flat_map(|at| (0..bits).filter(|bit| code >> bit & 1 == 1).map(move |bit| at * bits + bit))
        {
            bytes[bit / 8] |= 1 << (bit % 8);
        }
        Tensor::new(dtype, shape, bytes.into()).map_err(|e| self.fail(e.to_string()))
    }

    /// `(seed=7, std=0.05)`: the same numbers on every machine.
    fn random(&mut self, elements: usize) -> Parsed<Vec<f32>> {
        let (mut seed, mut deviation) = (0_u64, 1.0_f32);
        self.list('(', ')', |parser| {
            let key = parser.word()?;
            parser.expect('=')?;
            match key.as_str() {
                "seed" => seed = parser.number()?,
                "std" => deviation = parser.number()?,
                _ => return Err(parser.fail("rand takes seed and std")),
            }
            Ok(())
        })?;
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 16_777_216.0
        };
        // Twelve uniform numbers less six have mean 0 and variance 1.
        Ok((0..elements).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * deviation).collect())
    }

    fn hex(&mut self) -> Parsed<Vec<u8>> {
        self.expect('(')?;
        let digits = if self.peek() == Some(&Token::Mark(')')) { String::new() } else { self.word()? };
        self.expect(')')?;
        let byte = |at: usize| digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
        bytes.ok_or_else(|| self.fail("these are no pairs of hexadecimal digits"))
    }

    fn written_out(&mut self, dtype: DType, shape: Vec<usize>, elements: usize) -> Parsed<Tensor> {
        if dtype == DType::String {
            let strings = self.list('[', ']', |parser| match parser.peek().cloned() {
                Some(Token::Text(text)) => {
                    parser.at += 1;
                    Ok(Bytes::from(text.into_bytes()))
                }
                _ => Err(parser.fail("expected a string")),
            })?;
            return Tensor::strings(shape, strings).map_err(|e| self.fail(e.to_string()));
        }
        let start = self.at;
        let words = self.list('[', ']', Self::word)?;
        if words.len() != elements {
            self.at = start;
            return Err(self.fail(format!("{} values do not fill a shape of {elements}", words.len())));
        }
        let mut bytes = Vec::new();
        for word in &words {
            let encoded = encode(dtype, word).ok_or_else(|| {
                self.at = start;
                self.fail(format!("`{word}` is no {}", dtype.name()))
            })?;
            bytes.extend_from_slice(&encoded);
        }
        Tensor::new(dtype, shape, bytes.into()).map_err(|e| self.fail(e.to_string()))
    }
}

/// The little-endian bytes of one element.
fn encode(dtype: DType, word: &str) -> Option<Vec<u8>> {
    Some(match dtype {
        DType::F32 => word.parse::<f32>().ok()?.to_le_bytes().to_vec(),
        DType::F64 => word.parse::<f64>().ok()?.to_le_bytes().to_vec(),
        DType::Bool => vec![u8::from(word.parse::<bool>().ok()?)],
        DType::I8 => word.parse::<i8>().ok()?.to_le_bytes().to_vec(),
        DType::U8 => word.parse::<u8>().ok()?.to_le_bytes().to_vec(),
        DType::I16 => word.parse::<i16>().ok()?.to_le_bytes().to_vec(),
        DType::U16 => word.parse::<u16>().ok()?.to_le_bytes().to_vec(),
        DType::I32 => word.parse::<i32>().ok()?.to_le_bytes().to_vec(),
        DType::U32 => word.parse::<u32>().ok()?.to_le_bytes().to_vec(),
        DType::I64 => word.parse::<i64>().ok()?.to_le_bytes().to_vec(),
        DType::U64 => word.parse::<u64>().ok()?.to_le_bytes().to_vec(),
        _ => return None,
    })
}
