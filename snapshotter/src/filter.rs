//! containerd's filter language, as `List` gets it.
//!
//! ```text
//! filters   := filter ("or" between the items of the list)
//! filter    := selector ("," selector)*                     all must match; an empty filter matches everything
//! selector  := fieldpath [operator value]                   without operator: the field is there
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="
//! value     := quoted | [^\s,]+                             behind "~=" also /…/ and |…|
//! ```
//! Quoted texts use Go's escapes. Grammar and matching are those of containerd's `pkg/filters`.

use std::iter::Peekable;
use std::str::CharIndices;

use regex::Regex;
use thiserror::Error;

/// A filter that does not follow the grammar.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("filter {filter:?} is not valid at byte {at}: {what}")]
pub struct FilterError {
    filter: String,
    at: usize,
    what: String,
}

/// What a filter looks at.
pub trait Fields {
    /// The field's value, `None` if the object has no such field.
    fn field(&self, path: &[String]) -> Option<&str>;
}

/// A list of filters, of which one must match.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// `None`: the pattern does not compile, which matches nothing.
    Matches(Option<Regex>),
}

impl Filters {
    /// Reads a list of filters; an empty list matches everything.
    ///
    /// # Errors
    /// [`FilterError`] for the first one that does not follow the grammar.
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        filters.iter().map(|filter| Parser::new(filter).selectors()).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the object matches one of the filters.
    pub fn matches(&self, object: &impl Fields) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.matches(object)))
    }
}

impl Selector {
    fn matches(&self, object: &impl Fields) -> bool {
        let value = object.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(wanted) => value.unwrap_or_default() != wanted,
            Test::Matches(pattern) => pattern.as_ref().is_some_and(|p| p.is_match(value.unwrap_or_default())),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, rest: text.char_indices().peekable() }
    }

    fn error(&mut self, what: impl Into<String>) -> FilterError {
        let at = self.rest.peek().map_or(self.text.len(), |(at, _)| *at);
        FilterError { filter: self.text.into(), at, what: what.into() }
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|(_, c)| *c)
    }

    fn skip_spaces(&mut self) {
        while self.rest.next_if(|(_, c)| c.is_whitespace()).is_some() {}
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let mut taken = String::new();
        while let Some((_, c)) = self.rest.next_if(|(_, c)| wanted(*c)) {
            taken.push(c);
        }
        taken
    }

    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut all = Vec::new();
        if self.text.is_empty() {
            return Ok(all);
        }
        loop {
            all.push(self.selector()?);
            self.skip_spaces();
            match self.rest.next() {
                None => return Ok(all),
                Some((_, ',')) => {}
                Some(_) => return Err(self.error("a comma or the end is expected")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.rest.next_if(|(_, c)| *c == '.').is_some() {
            path.push(self.field()?);
        }
        self.skip_spaces();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let test = match operator.as_str() {
            "" => match self.peek() {
                None | Some(',') => Test::Present,
                Some(_) => return Err(self.error("an operator (==, != or ~=) is expected")),
            },
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(Regex::new(&self.value(true)?).ok()),
            other => return Err(self.error(format!("{other:?} is no operator"))),
        };
        Ok(Selector { path, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_spaces();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let field = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        if field.is_empty() {
            return Err(self.error("a field name or a quoted text is expected"));
        }
        Ok(field)
    }

    fn value(&mut self, pattern: bool) -> Result<String, FilterError> {
        self.skip_spaces();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if pattern => self.quoted(),
            Some('/' | '|') => Err(self.error("only ~= takes a value between / or |")),
            _ => {
                let value = self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                if value.is_empty() {
                    return Err(self.error("a value is expected"));
                }
                Ok(value)
            }
        }
    }

    fn quoted(&mut self) -> Result<String, FilterError> {
        let Some((_, quote)) = self.rest.next() else { return Err(self.error("a quoted text is expected")) };
        let mut bytes = Vec::new();
        loop {
            match self.rest.next() {
                None | Some((_, '\n')) => return Err(self.error("a quoted text does not end")),
                Some((_, c)) if c == quote => break,
                Some((_, '\\')) => self.escape(quote, &mut bytes)?,
                Some((_, c)) => push(&mut bytes, c),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.error("a quoted text is not UTF-8"))
    }

    fn escape(&mut self, quote: char, into: &mut Vec<u8>) -> Result<(), FilterError> {
        let Some((_, c)) = self.rest.next() else { return Err(self.error("a quoted text does not end")) };
        match c {
            'a' => into.push(7),
            'b' => into.push(8),
            'f' => into.push(12),
            'n' => into.push(b'\n'),
            'r' => into.push(b'\r'),
            't' => into.push(b'\t'),
            'v' => into.push(11),
            '\\' => into.push(b'\\'),
            'x' => into.push(self.digits(2, 16)? as u8),
            '0'..='7' => {
                let first = c.to_digit(8).unwrap_or_default();
                let value = first * 64 + self.digits(2, 8)?;
                into.push(u8::try_from(value).map_err(|_| self.error("an octal escape is beyond 255"))?);
            }
            'u' | 'U' => {
                let value = self.digits(if c == 'u' { 4 } else { 8 }, 16)?;
                push(into, char::from_u32(value).ok_or_else(|| self.error("an escape is no character"))?);
            }
            c if c == quote => push(into, c),
            _ => return Err(self.error("an escape is not known")),
        }
        Ok(())
    }

    fn digits(&mut self, count: usize, base: u32) -> Result<u32, FilterError> {
        let mut value = 0u32;
        for _ in 0..count {
            let digit = self.rest.next().and_then(|(_, c)| c.to_digit(base));
            let digit = digit.ok_or_else(|| self.error("an escape lacks digits"))?;
            value = value.wrapping_mul(base).wrapping_add(digit);
        }
        Ok(value)
    }
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Snapshot;

    impl Fields for Snapshot {
        fn field(&self, path: &[String]) -> Option<&str> {
            match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                ["name"] => Some("default/1/base"),
                ["kind"] => Some("committed"),
                ["parent"] => Some(""),
                ["labels", "containerd.io/snapshot.ref"] => Some("sha256:ab"),
                ["labels", "odd"] => Some("a,b \"c\""),
                _ => None,
            }
        }
    }

    fn matches(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|f| (*f).to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&Snapshot)
    }

    #[test]
    fn each_form_matches_as_containerd_does() {
        let cases: [(&[&str], bool); 22] = [
            (&[], true),
            (&[""], true),
            (&["kind==committed"], true),
            (&["kind == committed"], true),
            (&["kind==active"], false),
            (&["kind!=active"], true),
            (&["kind!=committed"], false),
            (&["name~=/base$/"], true),
            (&["name~=|^def.*\\\\d|"], true),
            (&["name~=\"^ba\""], false),
            (&["name~=/(/"], false),
            (&["labels.\"containerd.io/snapshot.ref\"==sha256:ab"], true),
            (&["labels.\"containerd.io/snapshot.ref\"==\"sha256:ab\""], true),
            (&["labels.odd==\"a,b \\\"c\\\"\""], true),
            (&["labels.odd"], true),
            (&["labels.none"], false),
            (&["labels.none!=x"], true),
            (&["labels.none==\"\""], false),
            (&["parent==\"\""], true),
            (&["kind==committed,labels.none"], false),
            (&["kind==active", "labels.odd"], true),
            (&["name==default/1/base , kind==committed"], true),
        ];
        for (filters, expected) in cases {
            assert_eq!(matches(filters), expected, "{filters:?}");
        }
    }

    #[test]
    fn parse_of_what_the_grammar_lacks_returns_an_error() {
        for bad in [
            "==x",
            "kind=",
            "kind==",
            "kind=committed",
            "kind===x",
            "a b",
            "a..b",
            "labels.\"x",
            "a==/x/",
            "a==\"\\q\"",
            ",",
            "a,",
        ] {
            assert!(Filters::parse(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = Filters::parse(&[text]);
        }

        #[test]
        fn a_quoted_value_is_read_back(value in "[ -~]{0,20}") {
            let escaped: String = value.chars().flat_map(|c| match c {
                '"' | '\\' => vec!['\\', c],
                c => vec![c],
            }).collect();
            let parsed = Filters::parse(&[format!("a==\"{escaped}\"")]).unwrap();
            let Test::Equal(read) = &parsed.0[0][0].test else { panic!("no equality") };
            prop_assert_eq!(read, &value);
        }
    }
}
