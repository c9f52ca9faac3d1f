//! The register machine of a 16550A UART (National Semiconductor PC16550D data sheet). Knows no bus, no wire and no
//! host: bytes go in and out, and the interrupt output is a level to be looked at.
//!
//! Transmission takes no time: the transmitter is always empty. The line runs at any speed, so the divisor is only
//! remembered.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Depth of the receive FIFO.
pub(super) const FIFO_BYTES: usize = 16;

/// Data register; low byte of the divisor while DLAB is set.
const DATA: u64 = 0;
/// Interrupt enable; high byte of the divisor while DLAB is set.
const IER: u64 = 1;
/// Interrupt identification (read), FIFO control (write).
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_THR_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;
const IER_BITS: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_THR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_BITS: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_THR_EMPTY: u8 = 1 << 5;
const LSR_IDLE: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// The line's other end is there and ready.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

#[derive(Clone, Debug)]
pub(super) struct Uart {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    /// Changed bits of the modem status since it was last read, in its low half.
    modem_delta: u8,
    overrun: bool,
    /// The transmitter ran empty and nobody has asked why.
    thr_interrupt: bool,
    fifo: VecDeque<u8>,
    /// Line status reads in a row without receive interrupt: from the second on, the guest polls for input.
    polls: u8,
    /// Bytes that were in the FIFO when the guest cleared it, to be put back on the line.
    unread: Vec<u8>,
}

/// The saved state.
#[derive(Serialize, Deserialize)]
pub(super) struct UartV1 {
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    modem_delta: u8,
    overrun: bool,
    thr_interrupt: bool,
    pub(super) fifo: Vec<u8>,
    polls: u8,
}

impl Uart {
    pub(super) fn new() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            scratch: 0,
            modem_delta: 0,
            overrun: false,
            thr_interrupt: false,
            fifo: VecDeque::new(),
            polls: 0,
            unread: Vec::new(),
        }
    }

    pub(super) fn read(&mut self, offset: u64) -> u8 {
        if offset != LSR {
            self.polls = 0;
        }
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_access() => divisor_low,
            IER if self.divisor_access() => divisor_high,
            DATA => self.fifo.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR_FCR => self.identify(),
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.line_status(),
            MSR => self.modem_status(),
            SCR => self.scratch,
            _ => 0xff,
        }
    }

    /// Returns the byte that this write sends, if it does.
    pub(super) fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        self.polls = 0;
        let [divisor_low, divisor_high] = self.divisor.to_le_bytes();
        match offset {
            DATA if self.divisor_access() => self.divisor = u16::from_le_bytes([value, divisor_high]),
            IER if self.divisor_access() => self.divisor = u16::from_le_bytes([divisor_low, value]),
            DATA => return self.transmit(value),
            IER => {
                let newly = value & !self.ier;
                self.ier = value & IER_BITS;
                // Enabling the interrupt while the transmitter is empty raises it at once.
                self.thr_interrupt |= newly & IER_THR_EMPTY != 0;
            }
            IIR_FCR => self.control_fifo(value),
            LCR => self.lcr = value,
            MCR => self.control_modem(value),
            SCR => self.scratch = value,
            _ => {}
        }
        None
    }

    /// How many bytes of input the guest should be given now.
    pub(super) fn wants_input(&self) -> usize {
        let listens = self.ier & IER_RECEIVED != 0 || self.polls > 1;
        if self.looped() || !listens {
            return 0;
        }
        self.depth().saturating_sub(self.fifo.len())
    }

    /// Takes bytes off the line, at most [`Uart::wants_input`].
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        self.fifo.extend(bytes);
    }

    /// What the guest cleared out of the FIFO unread.
    pub(super) fn take_unread(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.unread)
    }

    /// Empties the FIFO of what came from the line.
    pub(super) fn take_received(&mut self) -> Vec<u8> {
        let bytes: Vec<u8> = self.fifo.drain(..).collect();
        if self.looped() {
            Vec::new()
        } else {
            bytes
        }
    }

    /// The interrupt output.
    pub(super) fn interrupt_level(&self) -> bool {
        self.pending() != IIR_NONE
    }

    fn divisor_access(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn depth(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 {
            FIFO_BYTES
        } else {
            1
        }
    }

    fn trigger(&self) -> usize {
        match (self.fcr & FCR_ENABLE != 0, self.fcr & FCR_TRIGGER) {
            (false, _) | (true, 0x00) => 1,
            (true, 0x40) => 4,
            (true, 0x80) => 8,
            (true, _) => 14,
        }
    }

    /// The pending interrupt of the highest priority (data sheet, table IV).
    fn pending(&self) -> u8 {
        if self.ier & IER_LINE != 0 && self.overrun {
            IIR_LINE
        } else if self.ier & IER_RECEIVED != 0 && self.fifo.len() >= self.trigger() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.fifo.is_empty() {
            // Nothing follows within four character times: time does not pass on this line.
            IIR_TIMEOUT
        } else if self.ier & IER_THR_EMPTY != 0 && self.thr_interrupt {
            IIR_THR_EMPTY
        } else if self.ier & IER_MODEM != 0 && self.modem_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let pending = self.pending();
        if pending == IIR_THR_EMPTY {
            self.thr_interrupt = false;
        }
        let fifo = if self.fcr & FCR_ENABLE != 0 { IIR_FIFO } else { 0 };
        pending | fifo
    }

    fn line_status(&mut self) -> u8 {
        if self.ier & IER_RECEIVED == 0 {
            self.polls = self.polls.saturating_add(1);
        }
        let mut status = LSR_THR_EMPTY | LSR_IDLE;
        if !self.fifo.is_empty() {
            status |= LSR_DATA_READY;
        }
        if std::mem::take(&mut self.overrun) {
            status |= LSR_OVERRUN;
        }
        status
    }

    fn modem_lines(&self) -> u8 {
        if !self.looped() {
            return MSR_CONNECTED;
        }
        [(MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .iter()
            .filter(|(control, _)| self.mcr & control != 0)
            .fold(0, |lines, (_, status)| lines | status)
    }

    fn modem_status(&mut self) -> u8 {
        self.modem_lines() | std::mem::take(&mut self.modem_delta)
    }

    fn control_modem(&mut self, value: u8) {
        let before = self.modem_lines();
        if (self.mcr ^ value) & MCR_LOOP != 0 {
            // What was looped back is not input, and what was input is not loop-back.
            let from_line = self.take_received();
            self.unread.extend(from_line);
        }
        self.mcr = value & MCR_BITS;
        self.modem_delta |= (before ^ self.modem_lines()) >> 4;
    }

    fn control_fifo(&mut self, value: u8) {
        // Switching the FIFO on or off empties it too.
        if value & FCR_CLEAR_RECEIVER != 0 || (value ^ self.fcr) & FCR_ENABLE != 0 {
            let from_line = self.take_received();
            self.unread.extend(from_line);
        }
        self.fcr = if value & FCR_ENABLE != 0 { value & (FCR_ENABLE | FCR_TRIGGER) } else { 0 };
    }

    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.thr_interrupt = true;
        if !self.looped() {
            return Some(value);
        }
        if self.fifo.len() < self.depth() {
            self.fifo.push_back(value);
        } else {
            self.overrun = true;
        }
        None
    }

    pub(super) fn save(&self) -> UartV1 {
        UartV1 {
            divisor: self.divisor,
            ier: self.ier,
            fcr: self.fcr,
            lcr: self.lcr,
            mcr: self.mcr,
            scratch: self.scratch,
            modem_delta: self.modem_delta,
            overrun: self.overrun,
            thr_interrupt: self.thr_interrupt,
            fifo: self.fifo.iter().copied().collect(),
            polls: self.polls,
        }
    }

    /// `None` if no UART can be in that state.
    pub(super) fn restore(state: UartV1) -> Option<Self> {
        let reserved = (state.ier & !IER_BITS) | (state.mcr & !MCR_BITS) | (state.modem_delta & !0x0f);
        let fcr = state.fcr & !(FCR_ENABLE | FCR_TRIGGER);
        if reserved != 0 || fcr != 0 || state.fifo.len() > FIFO_BYTES {
            return None;
        }
        Some(Self {
            divisor: state.divisor,
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            scratch: state.scratch,
            modem_delta: state.modem_delta,
            overrun: state.overrun,
            thr_interrupt: state.thr_interrupt,
            fifo: state.fifo.into(),
            polls: state.polls,
            unread: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enabling_the_empty_interrupt_raises_it_until_identified() {
        let mut uart = Uart::new();
        uart.write(IER, IER_THR_EMPTY);
        assert!(uart.interrupt_level());
        assert_eq!(uart.read(IIR_FCR) & 0x0f, IIR_THR_EMPTY);
        assert!(!uart.interrupt_level());
        assert_eq!(uart.write(DATA, b'x'), Some(b'x'));
        assert!(uart.interrupt_level());
    }

    #[test]
    fn received_data_has_priority_over_the_empty_transmitter() {
        let mut uart = Uart::new();
        uart.write(IIR_FCR, FCR_ENABLE);
        uart.write(IER, IER_RECEIVED | IER_THR_EMPTY);
        uart.receive(b"a");
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_RECEIVED);
        assert_eq!(uart.read(DATA), b'a');
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_THR_EMPTY);
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_NONE);
    }

    #[test]
    fn fewer_bytes_than_the_trigger_time_out() {
        let mut uart = Uart::new();
        uart.write(IIR_FCR, FCR_ENABLE | 0x80);
        uart.write(IER, IER_RECEIVED);
        uart.receive(b"abc");
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_TIMEOUT);
        uart.receive(b"defgh");
        assert_eq!(uart.read(IIR_FCR), IIR_FIFO | IIR_RECEIVED);
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines_and_sends_nothing() {
        let mut uart = Uart::new();
        uart.write(MCR, MCR_LOOP | MCR_RTS | MCR_OUT2);
        assert_eq!(uart.write(DATA, 0x55), None);
        assert_eq!(uart.read(LSR) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!(uart.read(DATA), 0x55);
        assert_eq!(uart.read(MSR) & 0xf0, MSR_CTS | MSR_DCD);
    }

    #[test]
    fn loopback_beyond_the_fifo_overruns() {
        let mut uart = Uart::new();
        uart.write(IIR_FCR, FCR_ENABLE);
        uart.write(MCR, MCR_LOOP);
        for value in 0..20 {
            uart.write(DATA, value);
        }
        assert_eq!(uart.read(LSR) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(uart.read(LSR) & LSR_OVERRUN, 0);
        let got: Vec<u8> = (0..16).map(|_| uart.read(DATA)).collect();
        assert_eq!(got, (0..16).collect::<Vec<u8>>());
    }

    #[test]
    fn divisor_is_reached_only_under_dlab() {
        let mut uart = Uart::new();
        uart.write(LCR, LCR_DLAB | 3);
        uart.write(DATA, 0x34);
        uart.write(IER, 0x12);
        assert_eq!((uart.read(DATA), uart.read(IER)), (0x34, 0x12));
        uart.write(LCR, 3);
        assert_eq!(uart.read(IER), 0);
    }
}
