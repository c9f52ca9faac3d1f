//! Kill: signals become buttons.

use tracing::info;

use super::{blocking, Tasks};
use crate::error::{Error, Kind, Result};
use crate::instance::Press;

/// Signal numbers of Linux on x86_64 (signal(7)).
mod signal {
    pub(super) const NONE: u32 = 0;
    pub(super) const INT: u32 = 2;
    pub(super) const QUIT: u32 = 3;
    pub(super) const KILL: u32 = 9;
    pub(super) const TERM: u32 = 15;
    pub(super) const PWR: u32 = 30;
    /// SIGCHLD, SIGCONT, SIGURG, SIGWINCH: a process that does not care for them goes on (signal(7)), and clients that
    /// forward all signals send them unasked.
    pub(super) const HARMLESS: [u32; 4] = [17, 18, 23, 28];
    /// systemd's "halt" and "power off" for containers (systemd(1): SIGRTMIN+3, SIGRTMIN+4), the STOPSIGNAL of images
    /// that boot systemd.
    pub(super) const RTMIN_3: u32 = 37;
    pub(super) const RTMIN_4: u32 = 38;
    /// The largest one.
    pub(super) const MAX: u32 = 64;
}

/// What a signal means to a machine; nothing for those that only a process inside could understand.
fn press(number: u32) -> Option<Press> {
    match number {
        signal::KILL => Some(Press::Kill),
        signal::TERM | signal::INT | signal::QUIT | signal::PWR | signal::RTMIN_3 | signal::RTMIN_4 => {
            Some(Press::PowerButton)
        }
        _ => None,
    }
}

impl Tasks {
    /// Sends a signal.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is no such container or it has ended; [`Kind::Invalid`] for no signal;
    /// [`Kind::Unimplemented`] for one that a machine does not know.
    pub async fn kill(&self, id: &str, exec_id: &str, number: u32) -> Result<()> {
        let container = self.get_init(id, exec_id)?;
        container.alive()?;
        if number == signal::NONE || signal::HARMLESS.contains(&number) {
            return Ok(());
        }
        if number > signal::MAX {
            return Err(Error::new(Kind::Invalid, format!("{number} is no signal")));
        }
        let Some(what) = press(number) else {
            return Err(Error::new(
                Kind::Unimplemented,
                format!(
                    "a virtual machine without an agent does not know signal {number}: SIGTERM and SIGINT press its \
                     power button, SIGKILL ends it"
                ),
            ));
        };
        info!(id, signal = number, ?what, "signal");
        let instance = container.instance.clone();
        match blocking(move || instance.press(what)).await {
            // The machine may have ended in between.
            Err(_) if container.exit().is_some() => container.alive(),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_signals_press_the_button_and_only_kill_kills() {
        for number in [2, 3, 15, 30, 37, 38] {
            assert_eq!(press(number), Some(Press::PowerButton), "{number}");
        }
        assert_eq!(press(9), Some(Press::Kill));
        for number in [1, 10, 12] {
            assert_eq!(press(number), None, "{number}");
        }
    }
}
