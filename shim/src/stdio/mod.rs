//! A container's standard streams become the two ends of a machine's console.
//!
//! ```text
//!  client ──stdin fifo──>  VMM reads           the shim holds each fifo open at both ends, so that clients come and
//!  client <──stdout fifo── VMM writes          go; when the machine has ended it lets go, and they see the end
//!  logger <──pipe──────────VMM writes          binary://
//!  file   <─thread──pipe───VMM writes          file://
//! ```
//! A machine has one console, so everything is on stdout; stderr is opened, since clients wait for its end, and stays
//! empty. The bytes are raw in both directions with and without a terminal: the guest's own tty does what a pty would.
//! No byte passes through the shim but those for a file ([`relay`]).

mod fifo;
mod logger;
mod relay;
mod uri;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ovms_engine::Stdio as Console;

use self::fifo::Fifo;
use self::logger::Logger;
use self::relay::Relay;
use self::uri::Target;
use crate::error::{Error, Result};

/// The streams as the client names them; State repeats them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Path or URI; empty: nothing.
    pub stdin: String,
    /// Path or URI; empty: nothing.
    pub stdout: String,
    /// Path or URI; empty: nothing.
    pub stderr: String,
    /// The client has a terminal.
    pub terminal: bool,
}

/// What the shim holds open while a machine lives.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Option<Fifo>,
    stdout: Option<Fifo>,
    stderr: Option<Fifo>,
    logger: Option<Logger>,
    relay: Option<Relay>,
}

impl Streams {
    /// Opens what `stdio` names and gives the ends for the machine. Waits for nothing but a `binary://` logger.
    ///
    /// # Errors
    /// When a name makes no sense, cannot be opened, or the logger does not start.
    pub fn open(stdio: &Stdio, namespace: &str, id: &str) -> Result<(Self, Console)> {
        let mut streams = Self::default();
        let mut console = Console::default();
        if !stdio.stdin.is_empty() {
            let Target::Fifo(path) = uri::parse(&stdio.stdin)? else {
                return Err(uri::refused(&stdio.stdin, "standard input can only be a fifo"));
            };
            let fifo = Fifo::open(&path)?;
            console.stdin = Some(fifo.reader()?);
            streams.stdin = Some(fifo);
        }
        match uri::parse(&stdio.stdout)? {
            Target::Null => {}
            Target::Fifo(path) => {
                let fifo = Fifo::open(&path)?;
                fifo.enlarge();
                console.stdout = Some(fifo.writer()?);
                streams.stdout = Some(fifo);
            }
            Target::File(path) => {
                let (relay, output) = Relay::start(append(&path)?)?;
                console.stdout = Some(output);
                streams.relay = Some(relay);
            }
            Target::Binary { program, args } => {
                let (logger, output) = Logger::start(&program, &args, namespace, id)?;
                console.stdout = Some(output);
                streams.logger = Some(logger);
            }
        }
        // With a terminal there is no stderr, whatever name the client sends (nerdctl sends one and makes no fifo).
        if !stdio.terminal {
            if let Target::Fifo(path) = uri::parse(&stdio.stderr)? {
                streams.stderr = Some(Fifo::open(&path)?);
            }
        }
        Ok((streams, console))
    }

    /// Lets go of standard input: the guest's console sees its end once the client has closed it too.
    pub fn close_input(&mut self) {
        self.stdin = None;
    }

    /// The machine has ended: clients see the end of its streams, and a file has all of its output.
    pub fn end(&mut self) -> Unread {
        self.stdin = None;
        self.stderr = None;
        if let Some(relay) = self.relay.take() {
            relay.finish();
        }
        Unread { fifo: self.stdout.take() }
    }

    /// The logger, to be waited for once its pipes are closed.
    pub fn take_logger(&mut self) -> Option<Logger> {
        self.logger.take()
    }
}

/// Output that nobody may have read yet.
#[derive(Debug, Default)]
pub struct Unread {
    fifo: Option<Fifo>,
}

impl Unread {
    /// Lets go at once if a client reads or nothing is left; else waits a while for a client, since a fifo forgets
    /// when its last holder leaves. Blocks for at most [`fifo::LINGER`].
    pub fn release(self) {
        if let Some(fifo) = self.fifo {
            fifo.release();
        }
    }
}

fn append(path: &Path) -> Result<File> {
    let failed = |source| Error::caused(format!("cannot open the log file {}", path.display()), source);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(failed)
}

#[cfg(test)]
mod tests;
