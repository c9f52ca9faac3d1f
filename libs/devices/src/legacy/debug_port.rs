//! The POST code port, I/O 0x80: a guest writes a byte, the host notes when. Benchmarks measure a boot by it.

use std::sync::Arc;
use std::time::Instant;

use crate::bus::BusDevice;

/// What happens on a write: the code, and the moment the exit was handled.
pub type OnCode = Arc<dyn Fn(u8, Instant) + Send + Sync>;

/// The port.
pub struct DebugPort {
    on_code: OnCode,
}

impl DebugPort {
    /// The I/O port.
    pub const PORT: u64 = 0x80;

    /// A port that calls `on_code` on the vCPU thread; it must not block. Kernels also write here to pass time.
    pub fn new(on_code: OnCode) -> Self {
        Self { on_code }
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Some(code)) = (offset, data.first()) {
            (self.on_code)(*code, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::contract;
    use std::sync::Mutex;

    #[test]
    fn write_reports_code_and_time() {
        let codes = Arc::new(Mutex::new(Vec::new()));
        let log = codes.clone();
        let port = DebugPort::new(Arc::new(move |code, at| log.lock().unwrap().push((code, at))));
        let before = Instant::now();
        port.write(0, &[0x41]);
        let seen = codes.lock().unwrap()[0];
        assert_eq!(seen.0, 0x41);
        assert!(seen.1 >= before);
    }

    #[test]
    fn contract_holds() {
        contract::bus_device(|| Arc::new(DebugPort::new(Arc::new(|_, _| {}))), 1);
    }
}
