//! A socket that carries one JSON value a packet, with file descriptors beside it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::de::DeserializeOwned;
use serde::Serialize;
use thiserror::Error;

use crate::sys;

/// The largest packet in bytes. A configuration with 253 descriptors and a full command line stays far below it, and
/// it fits the kernel's default socket buffer (net.core.wmem_default, 208 KiB).
pub const MAX_PACKET: usize = 128 << 10;

/// The most descriptors in one packet (`SCM_MAX_FD` of the kernel's include/net/scm.h).
pub const MAX_FDS: usize = 253;

/// What can go wrong on a channel.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other side has closed it.
    #[error("the other side has closed the control socket")]
    Closed,
    /// The kernel refused.
    #[error("the control socket failed")]
    Io(#[source] io::Error),
    /// A packet does not decode.
    #[error("a packet on the control socket cannot be read")]
    Decode(#[source] serde_json::Error),
    /// A value does not fit a packet.
    #[error(
        "a control packet of {bytes} bytes and {fds} descriptors is too large (at most {MAX_PACKET} and {MAX_FDS})"
    )]
    TooLarge {
        /// Encoded length in bytes.
        bytes: usize,
        /// Number of descriptors.
        fds: usize,
    },
}

/// One end of a control socket. All methods take `&self`: one thread may send while another receives.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// A connected pair, both ends close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Io`].
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = sys::socketpair().map_err(ChannelError::Io)?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Takes over an `AF_UNIX` socket of type `SOCK_SEQPACKET`.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one value with the descriptors `fds` beside it; blocks while the socket buffer is full.
    ///
    /// # Errors
    /// [`ChannelError::TooLarge`], [`ChannelError::Closed`], [`ChannelError::Io`].
    pub fn send<T: Serialize>(&self, value: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(value).map_err(ChannelError::Decode)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge { bytes: bytes.len(), fds: fds.len() });
        }
        sys::send(self.socket.as_fd(), &bytes, fds).map_err(|err| match err.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ChannelError::Closed,
            _ => ChannelError::Io(err),
        })
    }

    /// Waits for one value and the descriptors beside it, which are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end of the stream, [`ChannelError::Decode`], [`ChannelError::Io`].
    pub fn recv<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        let mut buffer = vec![0; MAX_PACKET];
        let (length, fds) = sys::recv(self.socket.as_fd(), &mut buffer).map_err(ChannelError::Io)?;
        if length == 0 {
            return Err(ChannelError::Closed);
        }
        let packet = buffer.get(..length).unwrap_or_default();
        Ok((serde_json::from_slice(packet).map_err(ChannelError::Decode)?, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn a_value_and_its_descriptors_arrive() {
        let (a, b) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"disk").unwrap();
        a.send(&"hello", &[file.as_fd()]).unwrap();
        let (value, mut fds) = b.recv::<String>().unwrap();
        assert_eq!(value, "hello");
        let mut received = File::from(fds.remove(0));
        assert!(fds.is_empty());
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "disk");
    }

    #[test]
    fn recv_after_close_returns_closed() {
        let (a, b) = Channel::pair().unwrap();
        drop(a);
        assert!(matches!(b.recv::<u32>(), Err(ChannelError::Closed)));
        assert!(matches!(b.send(&1u32, &[]), Err(ChannelError::Closed)));
    }

    #[test]
    fn send_too_large_returns_too_large() {
        let (a, _b) = Channel::pair().unwrap();
        assert!(matches!(a.send(&"x".repeat(MAX_PACKET), &[]), Err(ChannelError::TooLarge { .. })));
    }

    #[test]
    fn as_many_descriptors_as_the_kernel_takes_arrive() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let fds = vec![file.as_fd(); MAX_FDS];
        a.send(&1u32, &fds).unwrap();
        assert_eq!(b.recv::<u32>().unwrap().1.len(), MAX_FDS);
    }
}
