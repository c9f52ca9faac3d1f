//! The command line as containerd writes it: single-dash flags, then an action.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};

/// What the program was started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the server of a container and print its address.
    Start,
    /// Clean up after a server that is gone.
    Delete,
    /// Be the server; the listening socket is standard input. Only `start` asks for this.
    Serve,
    /// Describe the runtime (`-info`).
    Info,
    /// Print the version (`-v`).
    Version,
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// The bundle, for `delete`.
    pub bundle: Option<PathBuf>,
    /// Where to listen: only between `start` and `serve`.
    pub socket: Option<PathBuf>,
    /// Log at debug level.
    pub debug: bool,
}

/// Flags with a value that containerd may pass and that mean nothing here.
const IGNORED: [&str; 1] = ["publish-binary"];

/// Reads the arguments behind the program's name.
///
/// # Errors
/// [`Kind::Invalid`] for an unknown flag or action, a missing value, an id that cannot name a file.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Args> {
    let mut parsed = Args {
        action: Action::Serve,
        namespace: String::new(),
        id: String::new(),
        address: String::new(),
        bundle: None,
        socket: None,
        debug: false,
    };
    let mut action = None;
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let arg = text(arg)?;
        let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
            action = Some(action_of(&arg)?);
            continue;
        };
        let (flag, inline) = match flag.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (flag, None),
        };
        match flag {
            "debug" => parsed.debug = inline.as_deref() != Some("false"),
            "info" => action = Some(Action::Info),
            "v" | "version" => action = Some(Action::Version),
            _ => {
                let value = match inline {
                    Some(value) => value,
                    None => text(args.next().ok_or_else(|| invalid(format!("flag -{flag} needs a value")))?)?,
                };
                set(&mut parsed, flag, value)?;
            }
        }
    }
    parsed.action = action.ok_or_else(|| {
        invalid("this program is started by containerd: use `ctr run --runtime io.containerd.ovms.v1`")
    })?;
    check(&parsed)?;
    Ok(parsed)
}

fn set(parsed: &mut Args, flag: &str, value: String) -> Result<()> {
    match flag {
        "namespace" => parsed.namespace = value,
        "id" => parsed.id = value,
        "address" => parsed.address = value,
        "bundle" => parsed.bundle = Some(value.into()),
        "socket" => parsed.socket = Some(value.into()),
        _ if IGNORED.contains(&flag) => {}
        _ => return Err(invalid(format!("unknown flag -{flag}"))),
    }
    Ok(())
}

fn action_of(word: &str) -> Result<Action> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "serve" => Ok(Action::Serve),
        _ => Err(invalid(format!("unknown action {word:?}: containerd asks for start or delete"))),
    }
}

/// The names become parts of file names, so they may not lead elsewhere.
fn check(parsed: &Args) -> Result<()> {
    if matches!(parsed.action, Action::Info | Action::Version) {
        return Ok(());
    }
    for (flag, value) in [("id", &parsed.id), ("namespace", &parsed.namespace)] {
        if value.is_empty() || value.contains(['/', '\0']) || value == "." || value == ".." {
            return Err(invalid(format!("{value:?} is no {flag} of a container")));
        }
    }
    Ok(())
}

fn text(arg: OsString) -> Result<String> {
    arg.into_string().map_err(|arg| invalid(format!("argument {arg:?} is not UTF-8")))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Args> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_line_that_containerd_writes_is_understood() {
        let args = parse_line(
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id vm1 -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("default", "vm1"));
        assert_eq!(args.address, "/run/c.sock");
        assert!(args.debug);
    }

    #[test]
    fn delete_names_its_bundle() {
        let args =
            parse_line("-namespace k8s.io -address a -publish-binary b -id vm1 -bundle /run/b/vm1 delete").unwrap();
        assert_eq!((args.action, args.bundle), (Action::Delete, Some("/run/b/vm1".into())));
    }

    #[test]
    fn info_and_version_need_no_names() {
        assert_eq!(parse_line("-info").unwrap().action, Action::Info);
        assert_eq!(parse_line("-v").unwrap().action, Action::Version);
    }

    #[test]
    fn parse_invalid_line_returns_a_sentence_that_names_it() {
        for (line, expected) in [
            ("-id vm1 -namespace n explode", "explode"),
            ("-bogus x start", "-bogus"),
            ("-id ../../etc -namespace n start", "../../etc"),
            ("-id vm1 start", "namespace"),
            ("-id", "needs a value"),
            ("", "started by containerd"),
        ] {
            let err = parse_line(line).unwrap_err();
            assert!(err.chain().contains(expected), "{line}: {}", err.chain());
        }
    }
}
