//! Below TCP: who a frame is for, ARP (RFC 826), ICMP echo (RFC 792), UDP echo (RFC 862).
//!
//! ```text
//! frame ─▶ ours or broadcast? ─┬ ARP who-has our address ─▶ is-at
//!                              └ IPv4 to our address ─┬ ICMP echo ─▶ reply
//!                                                     ├ UDP port 7 ─▶ the same back
//!                                                     └ TCP ─▶ `tcp`
//! ```
//!
//! The trap: a switch still sends the guest's frames to the host that died. After a takeover the guest says where
//! it is (a gratuitous ARP, RFC 5227 3) before anything else.

use super::machine::Context;
use super::wire::{
    Arp, BROADCAST, ETHERTYPE_ARP, ETHERTYPE_IPV4, Ethernet, Ip, Ipv4, Mac, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP,
    checksum, ethernet, ipv4_header, transport_checksum,
};

const UDP_ECHO_PORT: [u8; 2] = [0, 7];
const UDP_HEAD_BYTES: usize = 8;

impl Context<'_> {
    /// A frame from the network.
    pub(super) fn frame_input(&mut self, frame: &[u8]) {
        let Some(ethernet) = Ethernet::parse(frame) else { return };
        if ethernet.dst != self.mac() && ethernet.dst != BROADCAST {
            return;
        }
        match ethernet.ethertype {
            ETHERTYPE_ARP => self.arp_input(ethernet.payload),
            // Only what was sent to this guest alone is answered: an answer to a broadcast is an amplifier.
            ETHERTYPE_IPV4 if ethernet.dst == self.mac() => {
                if let Some(ip) = Ipv4::parse(ethernet.payload).filter(|ip| ip.dst == self.ip()) {
                    self.ipv4_input(ethernet.src, &ip);
                }
            }
            _ => {}
        }
    }

    /// Tells the network where this guest is now.
    pub(super) fn announce_address(&mut self) {
        let (mac, ip) = (self.mac(), self.ip());
        let arp = Arp { request: true, sender_mac: mac, sender_ip: ip, target_mac: [0; 6], target_ip: ip };
        self.emit(BROADCAST, ETHERTYPE_ARP, &[&arp.emit()]);
    }

    /// Sends an IPv4 packet to a neighbour.
    pub(super) fn send_ipv4(&mut self, mac: Mac, dst: Ip, protocol: u8, payload: &[u8]) {
        let head = ipv4_header(self.ip(), dst, protocol, payload.len());
        self.emit(mac, ETHERTYPE_IPV4, &[&head, payload]);
    }

    fn arp_input(&mut self, bytes: &[u8]) {
        let Some(arp) = Arp::parse(bytes).filter(|arp| arp.request && arp.target_ip == self.ip()) else { return };
        // Our own announcement, echoed by the network, is not a question.
        if arp.sender_ip == self.ip() {
            return;
        }
        let reply = Arp {
            request: false,
            sender_mac: self.mac(),
            sender_ip: self.ip(),
            target_mac: arp.sender_mac,
            target_ip: arp.sender_ip,
        };
        self.emit(arp.sender_mac, ETHERTYPE_ARP, &[&reply.emit()]);
    }

    fn ipv4_input(&mut self, mac: Mac, ip: &Ipv4<'_>) {
        match ip.protocol {
            PROTOCOL_TCP => self.tcp_input(mac, ip),
            PROTOCOL_ICMP => {
                let whole = ip.payload.len() >= 8 && checksum(&[ip.payload]) == 0;
                if whole && ip.payload[..2] == [8, 0] {
                    let mut reply = ip.payload.to_vec();
                    reply[..4].fill(0);
                    let sum = checksum(&[&reply]);
                    reply[2..4].copy_from_slice(&sum.to_be_bytes());
                    self.send_ipv4(mac, ip.src, PROTOCOL_ICMP, &reply);
                }
            }
            PROTOCOL_UDP => self.udp_input(mac, ip),
            _ => {}
        }
    }

    fn udp_input(&mut self, mac: Mac, ip: &Ipv4<'_>) {
        let bytes = ip.payload;
        if bytes.len() < UDP_HEAD_BYTES || bytes[2..4] != UDP_ECHO_PORT || bytes[..2] == UDP_ECHO_PORT {
            return;
        }
        // A checksum of zero means the sender made none (RFC 768).
        let unsummed = bytes[6..8] == [0, 0];
        let sized = usize::from(u16::from_be_bytes([bytes[4], bytes[5]])) == bytes.len();
        if !sized || !unsummed && transport_checksum(ip.src, ip.dst, PROTOCOL_UDP, bytes) != 0 {
            return;
        }
        let mut reply = bytes.to_vec();
        reply[..2].copy_from_slice(&bytes[2..4]);
        reply[2..4].copy_from_slice(&bytes[..2]);
        reply[6..8].fill(0);
        let sum = transport_checksum(self.ip(), ip.src, PROTOCOL_UDP, &reply);
        reply[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        self.send_ipv4(mac, ip.src, PROTOCOL_UDP, &reply);
    }

    fn emit(&mut self, dst: Mac, ethertype: u16, parts: &[&[u8]]) {
        let frame = ethernet(dst, self.mac(), ethertype, parts);
        self.registers.frames_sent = self.registers.frames_sent.wrapping_add(1);
        (self.tx)(&frame);
    }
}
