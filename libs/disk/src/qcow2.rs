//! qcow2, the format: reading a layer is [`crate::layer::convert`]'s; writing one is here.

use std::io::Write;

use crate::{Result, Stack};

/// The lay-out of a qcow2 v3 image (64 KiB clusters, no backing file name) before its first byte is written, so that it
/// can be streamed into a tar whose header wants the length.
#[derive(Debug)]
pub struct Plan<'a> {
    stack: &'a Stack,
}

impl<'a> Plan<'a> {
    /// What the stack's tops (frozen and writable) add to its layers. The stack must not be written meanwhile: open it
    /// read-only, or from frozen tops alone.
    ///
    /// # Errors
    /// A top's map cannot be read.
    pub fn diff(stack: &'a Stack) -> Result<Plan<'a>> {
        Ok(Plan { stack })
    }

    /// The whole disk in one image.
    ///
    /// # Errors
    /// A top's map cannot be read.
    pub fn flat(stack: &'a Stack) -> Result<Plan<'a>> {
        Ok(Plan { stack })
    }

    /// The length of the image file in bytes.
    #[must_use]
    pub fn file_size(&self) -> u64 {
        0
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn virtual_size(&self) -> u64 {
        self.stack.size()
    }

    /// Writes the image, front to back, without seeking.
    ///
    /// # Errors
    /// A file of the stack cannot be read, or the sink not be written.
    pub fn write_to<W: Write + ?Sized>(&self, sink: &mut W) -> Result<()> {
        let _ = sink;
        unimplemented!()
    }
}
