//! Ethernet frames of two guests, and QEMU's framing of them. No checksums: no comparator looks at them.

/// The guest's address.
pub const GUEST: [u8; 4] = [10, 0, 0, 2];

/// A frame of this type.
pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 9, 0x52, 0x54, 0, 0, 0, 2];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An IPv4 packet of the guest's to a client.
pub fn ipv4(client: [u8; 4], protocol: u8, ident: u16, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + payload.len() as u16).to_be_bytes());
    packet.extend(ident.to_be_bytes());
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(GUEST);
    packet.extend(client);
    packet.extend(payload);
    ethernet(0x0800, &packet)
}

/// A TCP segment of the guest's, from its port 80.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// The client's address and port.
    pub client: ([u8; 4], u16),
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
}

impl Segment {
    /// The frame, as small as it is.
    pub fn frame(&self, ident: u16) -> Vec<u8> {
        let mut tcp = [80_u16.to_be_bytes(), self.client.1.to_be_bytes()].concat();
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([0x50, self.flags, 0x20, 0, 0, 0, 0, 0]);
        tcp.extend(&self.payload);
        ipv4(self.client.0, 6, ident, 0, &tcp)
    }
}

/// A segment of a client's to the guest's port 80, without payload.
pub fn from_client(client: ([u8; 4], u16), seq: u32, ack: u32, flags: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(client.0);
    packet.extend(GUEST);
    packet.extend([client.1.to_be_bytes(), 80_u16.to_be_bytes()].concat());
    packet.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    packet.extend([0x50, flags, 0x20, 0, 0, 0, 0, 0]);
    ethernet(0x0800, &packet)
}

/// What a segment without IP options says, and acknowledges.
pub fn numbers(frame: &[u8]) -> (u32, u32) {
    let [seq, ack] = [38, 42].map(|at| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()));
    (seq, ack)
}

/// A UDP datagram of the guest's, from this port.
pub fn udp(port: u16, client: ([u8; 4], u16), ident: u16, payload: &[u8]) -> Vec<u8> {
    let mut udp =
        [port.to_be_bytes(), client.1.to_be_bytes(), (8 + payload.len() as u16).to_be_bytes(), [0; 2]].concat();
    udp.extend(payload);
    ipv4(client.0, 17, ident, 0, &udp)
}

/// An echo reply of the guest's.
pub fn ping(client: [u8; 4], id: u16, seq: u16, ident: u16, data: &[u8]) -> Vec<u8> {
    let mut icmp = [[0; 2], [0; 2], id.to_be_bytes(), seq.to_be_bytes()].concat();
    icmp.extend(data);
    ipv4(client, 1, ident, 0, &icmp)
}

/// An ARP announcement of one address, whomever it is for. Every comparator lets it pass, ours once both guests said it.
pub fn arp(number: u32) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 2, 0x52, 0x54, 0, 0, 0, 2];
    arp.extend(GUEST);
    arp.extend([0; 6]);
    arp.extend(number.to_be_bytes());
    ethernet(0x0806, &arp)
}

/// In QEMU's framing.
pub fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

/// In QEMU's framing with `vnet_hdr_support`.
pub fn framed_vnet(header: &[u8], frame: &[u8]) -> Vec<u8> {
    let words = [(header.len() + frame.len()) as u32, header.len() as u32].map(u32::to_be_bytes).concat();
    [&words[..], header, frame].concat()
}
