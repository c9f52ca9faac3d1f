//! Wait: blocks until the machine has ended; any number may.

use super::Tasks;
use crate::error::Result;
use crate::instance::Exit;

impl Tasks {
    /// How a container ended, as soon as it has.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        self.get_init(id, exec_id)?.ended().await
    }
}
