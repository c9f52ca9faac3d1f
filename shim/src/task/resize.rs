//! ResizePty and CloseIO.

use super::container::Status;
use super::{blocking, Tasks};
use crate::error::Result;

impl Tasks {
    /// Tells the guest how large the client's terminal is; before Start, it is what the guest finds. The serial console
    /// has no notion of it; the virtio console has. Without a terminal nothing happens.
    ///
    /// # Errors
    /// When there is no such container, or what the machine says.
    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let container = self.get_init(id, exec_id)?;
        if !container.stdio.terminal || matches!(container.status(), Status::Stopped) {
            return Ok(());
        }
        let columns = u16::try_from(width).unwrap_or(u16::MAX);
        let rows = u16::try_from(height).unwrap_or(u16::MAX);
        let instance = container.instance.clone();
        blocking(move || instance.resize(columns, rows)).await
    }

    /// Lets go of standard input.
    ///
    /// # Errors
    /// When there is no such container.
    pub fn close_io(&self, id: &str, exec_id: &str, stdin: bool) -> Result<()> {
        let container = self.get_init(id, exec_id)?;
        if stdin {
            container.streams().close_input();
        }
        Ok(())
    }
}
