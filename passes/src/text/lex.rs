//! Tokens.

use super::ParseError;

/// One token.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// `%name`
    Value(String),
    /// `@name`
    Name(String),
    /// A bare word or number: letters, digits and `_ . : + -`.
    Word(String),
    /// "…"
    Text(String),
    /// One of the marks `( ) { } [ ] , = ? :` or the arrow as `>`.
    Mark(char),
}

/// A token and where it starts.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) token: Token,
    pub(super) line: u32,
    pub(super) column: u32,
}

struct Lexer<'a> {
    chars: std::iter::Peekable<std::str::Chars<'a>>,
    line: u32,
    column: u32,
}

/// The tokens of `text`; `#` starts a comment.
pub(super) fn tokens(text: &str) -> Result<Vec<Placed>, ParseError> {
    let mut lexer = Lexer { chars: text.chars().peekable(), line: 1, column: 1 };
    let mut tokens = Vec::new();
    while let Some(&c) = lexer.chars.peek() {
        let (line, column) = (lexer.line, lexer.column);
        let token = match c {
            c if c.is_whitespace() => {
                lexer.next();
                continue;
            }
            '#' => {
                while lexer.chars.peek().is_some_and(|c| *c != '\n') {
                    lexer.next();
                }
                continue;
            }
            '%' | '@' => {
                lexer.next();
                let name = if lexer.chars.peek() == Some(&'"') { lexer.text()? } else { lexer.word("_./:-") };
                if name.is_empty() {
                    return Err(ParseError { line, column, problem: format!("`{c}` must be followed by a name") });
                }
                if c == '%' { Token::Value(name) } else { Token::Name(name) }
            }
            '"' => Token::Text(lexer.text()?),
            '-' if lexer.arrow() => Token::Mark('>'),
            '(' | ')' | '{' | '}' | '[' | ']' | ',' | '=' | '?' | ':' => {
                lexer.next();
                Token::Mark(c)
            }
            _ => {
                let word = lexer.word("_.:+-");
                if word.is_empty() {
                    return Err(ParseError { line, column, problem: format!("unexpected character {c:?}") });
                }
                Token::Word(word)
            }
        };
        tokens.push(Placed { token, line, column });
    }
    Ok(tokens)
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.chars.next()?;
        if c == '\n' {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
        Some(c)
    }

    /// Takes `->`, if that is what comes.
    fn arrow(&mut self) -> bool {
        let mut ahead = self.chars.clone();
        let found = ahead.next() == Some('-') && ahead.next() == Some('>');
        if found {
            self.next();
            self.next();
        }
        found
    }

    fn word(&mut self, extra: &str) -> String {
        let mut word = String::new();
        while let Some(&c) = self.chars.peek() {
            if !(c.is_ascii_alphanumeric() || extra.contains(c)) || (c == ':' && self.colon_ends_word(&word)) {
                break;
            }
            word.push(c);
            self.next();
        }
        word
    }

    /// A colon before a blank separates a name from its type.
    fn colon_ends_word(&self, word: &str) -> bool {
        let mut ahead = self.chars.clone();
        ahead.next();
        word.is_empty() || ahead.next().is_none_or(|c| c.is_whitespace() || c == '?')
    }

    fn text(&mut self) -> Result<String, ParseError> {
        let (line, column) = (self.line, self.column);
        let fail = |problem: &str| ParseError { line, column, problem: problem.to_owned() };
        self.next();
        let mut text = String::new();
        loop {
            match self.next().ok_or_else(|| fail("this string never ends"))? {
                '"' => return Ok(text),
                '\\' => match self.next() {
                    Some('u') => text.push(self.escape().ok_or_else(|| fail("a bad \\u{…} in this string"))?),
                    Some(c @ ('"' | '\\')) => text.push(c),
                    _ => return Err(fail("a bad escape in this string")),
                },
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Option<char> {
        if self.next()? != '{' {
            return None;
        }
        let mut code = String::new();
        loop {
            match self.next()? {
                '}' => return char::from_u32(u32::from_str_radix(&code, 16).ok()?),
                c if code.len() < 6 => code.push(c),
                _ => return None,
            }
        }
    }
}
