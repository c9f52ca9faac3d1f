//! What a stream's name means: a path or a URI of containerd's `cio` package.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use crate::error::{Error, Kind, Result};

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nowhere.
    Null,
    /// A fifo that the client has made.
    Fifo(PathBuf),
    /// A file to append to.
    File(PathBuf),
    /// A program that takes the output.
    Binary {
        /// Its path.
        program: PathBuf,
        /// Its arguments: keys and values of the query, one after the other.
        args: Vec<String>,
    },
}

/// Reads a stream's name.
pub(super) fn parse(text: &str) -> Result<Target> {
    if text.is_empty() {
        return Ok(Target::Null);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(Target::Fifo(absolute(text, text.into())?));
    };
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = absolute(text, OsString::from_vec(percent_decode_str(path).collect()).into())?;
    match scheme {
        "fifo" => Ok(Target::Fifo(path)),
        "file" => Ok(Target::File(path)),
        "binary" => Ok(Target::Binary {
            program: path,
            args: form_urlencoded::parse(query.as_bytes())
                .flat_map(|(key, value)| [key.into_owned(), value.into_owned()])
                .collect(),
        }),
        _ => Err(refused(text, "its scheme is not one of fifo, file and binary")),
    }
}

fn absolute(text: &str, path: PathBuf) -> Result<PathBuf> {
    if path.is_absolute() {
        Ok(path)
    } else {
        Err(refused(text, "its path is not absolute"))
    }
}

/// The error for a name that cannot be used.
pub(super) fn refused(text: &str, why: &str) -> Error {
    Error::new(Kind::Invalid, format!("the stream {text:?} cannot be used: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read() {
        assert_eq!(parse("").unwrap(), Target::Null);
        assert_eq!(parse("/run/c/fifo/1/vm-stdout").unwrap(), Target::Fifo("/run/c/fifo/1/vm-stdout".into()));
        assert_eq!(parse("fifo:///run/f").unwrap(), Target::Fifo("/run/f".into()));
        assert_eq!(parse("file:///var/log/vm%201.log").unwrap(), Target::File("/var/log/vm 1.log".into()));
        assert_eq!(
            parse("binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib%2Fnerdctl%2F1").unwrap(),
            Target::Binary {
                program: "/usr/bin/nerdctl".into(),
                args: vec!["_NERDCTL_INTERNAL_LOGGING".into(), "/var/lib/nerdctl/1".into()]
            }
        );
    }

    #[test]
    fn parse_unusable_name_returns_invalid() {
        for text in ["vm-stdout", "file://relative/x", "npipe:////./pipe/x"] {
            assert_eq!(parse(text).unwrap_err().kind(), Kind::Invalid, "{text}");
        }
    }
}
