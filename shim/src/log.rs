//! Log lines in the form of containerd's own (logrus text), into the `log` fifo of the bundle: containerd copies them
//! into its log. The fifo is opened at both ends, so that a containerd that is away neither blocks the shim nor kills
//! its writes; when it is full, lines are dropped.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write};
use std::sync::Mutex;

use rustix::fs::{open, Mode, OFlags};
use time::format_description::well_known::Rfc3339;
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The fifo's name in the bundle, which is the working directory.
const FIFO: &str = "log";

/// Sends what is logged to containerd from now on; to nowhere if there is no fifo.
pub fn init(debug: bool) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fifo) = open(FIFO, flags, Mode::empty()) else { return };
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Logrus)
        .with_writer(Mutex::new(Lossy(fifo.into())))
        .finish();
    // The only subscriber of the process.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Writes what fits.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `time="…" level=info msg="…" key=value`.
struct Logrus;

impl<S, N> FormatEvent<S, N> for Logrus
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let time = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
        writeln!(writer, "time=\"{time}\" level={level} msg={:?}{} runtime=ovms", fields.message, fields.others)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field.name(), &format!("{value:?}"));
    }
}

impl Fields {
    fn put(&mut self, name: &str, value: &str) {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._/:@".contains(c);
        // Writing to a String cannot fail.
        let _ = match name {
            // The engine passes the VMM's own lines on as this field, without a message.
            "message" | "vmm" => write!(self.message, "{value}"),
            _ if !value.is_empty() && value.chars().all(plain) => write!(self.others, " {name}={value}"),
            _ => write!(self.others, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_are_those_of_logrus() {
        let memory = Memory::default();
        let writer = memory.clone();
        let subscriber = tracing_subscriber::fmt().event_format(Logrus).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(id = "vm1", error = "no \"such\" disk", "cannot start");
        });
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let (time, rest) = text.split_once(" level=").unwrap();
        assert!(time.starts_with("time=\"20"), "{text}");
        assert_eq!(rest, "warning msg=\"cannot start\" id=vm1 error=\"no \\\"such\\\" disk\" runtime=ovms\n");
    }
}
