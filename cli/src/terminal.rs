//! The user's side of a machine's console: raw mode, the two pipes, and the signals that mean "stop".
//!
//! The machine gets pipes, never the terminal itself: it would set `O_NONBLOCK` on what it gets, and that flag belongs
//! to the open file, which the user's shell shares.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg, Termios};
use nix::unistd::geteuid;

/// Ctrl-]: as telnet(1) and `virsh console` have it.
const ESCAPE: u8 = 0x1d;
/// Stack of a thread that copies bytes.
const STACK: usize = 128 << 10;

/// Whether this process is root.
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// The terminal in raw mode, as long as this lives.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters it; `None` if stdin is no terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Err(err) = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before) {
            eprintln!("ovm: the terminal cannot be set back: {err}");
        }
    }
}

/// Our ends of the console's pipes.
pub struct Console {
    input: File,
    output: File,
}

impl Console {
    /// The pipes; the machine's ends are what it reads and what it writes.
    pub fn open() -> io::Result<(Self, OwnedFd, OwnedFd)> {
        let (machine_reads, input) = io::pipe()?;
        let (output, machine_writes) = io::pipe()?;
        let console = Self { input: OwnedFd::from(input).into(), output: OwnedFd::from(output).into() };
        Ok((console, machine_reads.into(), machine_writes.into()))
    }

    /// Copies what the machine writes to stdout. The thread ends when everything is out.
    pub fn write_out(self) -> io::Result<(Keyboard, JoinHandle<()>)> {
        let Self { input, output } = self;
        let written = copier("console-out").spawn(move || copy_out(output, io::stdout().lock()))?;
        Ok((Keyboard(input), written))
    }
}

/// The machine's input.
pub struct Keyboard(File);

impl Keyboard {
    /// Copies stdin to the machine. On a raw terminal the escape character calls `stop`, else it is a byte like any other.
    pub fn read_in(self, raw: bool, stop: impl Fn() + Send + 'static) -> io::Result<()> {
        // Ends with the process: it may wait for a key for ever.
        copier("console-in").spawn(move || {
            if let Err(err) = copy_in(io::stdin().lock(), self.0, raw.then_some(&stop)) {
                // A guest that is gone reads nothing more.
                if err.kind() != io::ErrorKind::BrokenPipe {
                    eprint!("ovm: stdin cannot be read: {err}\r\n");
                }
            }
        })?;
        Ok(())
    }
}

fn copier(name: &str) -> thread::Builder {
    thread::Builder::new().name(name.into()).stack_size(STACK)
}

fn copy_in(mut from: impl Read, mut to: impl Write, stop: Option<&impl Fn()>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        let Some(stop) = stop else {
            to.write_all(bytes)?;
            continue;
        };
        let mut parts = bytes.split(|byte| *byte == ESCAPE);
        to.write_all(parts.next().unwrap_or_default())?;
        for part in parts {
            stop();
            to.write_all(part)?;
        }
    }
}

/// Whoever reads our stdout may be gone; the guest is not to be held up by that, so its output is dropped then.
fn copy_out(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    let mut wanted = true;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                wanted = wanted && to.write_all(bytes).and_then(|()| to.flush()).is_ok();
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => (),
            Err(_) => return,
        }
    }
}

/// SIGTERM, SIGINT and SIGHUP, held back until somebody watches for them.
pub struct Signals(SignalFd);

impl Signals {
    /// Holds them back from now on. Must be called while the process has one thread: a signal goes to any thread that
    /// does not block it.
    pub fn hold() -> io::Result<Self> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?))
    }

    /// Calls `stop` for each of them, those that were held back too, instead of ending.
    pub fn watch(self, stop: impl Fn() + Send + 'static) -> io::Result<()> {
        thread::Builder::new().name("signals".into()).stack_size(STACK).spawn(move || {
            while self.0.read_signal().is_ok_and(|signal| signal.is_some()) {
                stop();
            }
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn the_escape_stops_and_is_not_passed_on() {
        let stops = Cell::new(0);
        let mut passed = Vec::new();
        copy_in(&b"ab\x1dc\x1d\x1d"[..], &mut passed, Some(&|| stops.set(stops.get() + 1))).unwrap();
        assert_eq!((passed.as_slice(), stops.get()), (&b"abc"[..], 3));
    }

    #[test]
    fn without_a_terminal_every_byte_is_the_guests() {
        let mut passed = Vec::new();
        copy_in(&b"a\x1db"[..], &mut passed, None::<&fn()>).unwrap();
        assert_eq!(passed, b"a\x1db");
    }

    #[test]
    fn output_goes_on_being_read_when_nobody_wants_it() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut rest = &[b'x'; 100_000][..];
        copy_out(&mut rest, Gone);
        assert!(rest.is_empty());
    }
}
