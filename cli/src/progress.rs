//! Progress: a bar on a terminal, a line for each step elsewhere. All of it goes to stderr.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use ovms_artifact::layout::Progress;
use ovms_bundle::unpack::Step;

use crate::text;

/// Shows the steps of a build or a check.
pub struct Steps {
    bar: Mutex<Option<ProgressBar>>,
    tty: bool,
    quiet: bool,
}

impl Steps {
    /// Shows steps on stderr, or nothing.
    pub fn new(quiet: bool) -> Self {
        Self { bar: Mutex::new(None), tty: std::io::stderr().is_terminal(), quiet }
    }

    /// Shows the steps of an unpacking, which tells of each as often as it gets on.
    pub fn following<T>(&self, unpack: impl FnOnce(&mut dyn FnMut(Step)) -> T) -> T {
        let mut shown: Option<(String, u64)> = None;
        let unpacked = unpack(&mut |Step { what, done, total }| {
            let mut from = 0;
            match shown.take() {
                Some((name, before)) if name == what => from = before,
                Some(_) => {
                    self.end();
                    self.begin(&what, total);
                }
                None => self.begin(&what, total),
            }
            self.advance(done.saturating_sub(from));
            shown = Some((what, done));
        });
        self.end();
        unpacked
    }

    fn with_bar(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        // A poisoned lock means a thread died while it drew; the bar is only for the eye.
        act(&mut self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

impl Progress for Steps {
    fn begin(&self, what: &str, bytes: u64) {
        if self.quiet {
            return;
        }
        if !self.tty {
            eprintln!("{what} ({})", text::size(bytes));
            return;
        }
        let bar = ProgressBar::new(bytes).with_message(what.to_owned());
        let template = "{msg:40!} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        self.with_bar(|slot| *slot = Some(bar));
    }

    fn advance(&self, bytes: u64) {
        self.with_bar(|slot| slot.iter().for_each(|bar| bar.inc(bytes)));
    }

    fn end(&self) {
        self.with_bar(|slot| slot.take().into_iter().for_each(|bar| bar.finish_and_clear()));
    }
}
