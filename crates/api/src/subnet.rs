//! Names of address ranges: `office=10.1.0.0/16`.

use std::{fmt, net::IpAddr, str::FromStr};

/// Longest name, in bytes.
const NAME_MAX: usize = 128;

/// A range of addresses and its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetLabel {
    name: String,
    address: IpAddr,
    length: u8,
}

impl SubnetLabel {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// First address as a number, IPv4 as the IPv6 addresses it is mapped to, and how many of its 128 bits are the range's.
    #[must_use]
    pub fn prefix(&self) -> (u128, u8) {
        match self.address {
            IpAddr::V4(address) => (u128::from(address.to_ipv6_mapped()), self.length + 96),
            IpAddr::V6(address) => (u128::from(address), self.length),
        }
    }
}

impl FromStr for SubnetLabel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(80).collect();
        let (name, range) = text
            .split_once('=')
            .ok_or_else(|| format!("`{shown}` has no `=` between name and range"))?;
        if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
            return Err(format!("`{shown}`: a name has 1 to {NAME_MAX} bytes"));
        }
        let (address, length) = range
            .split_once('/')
            .ok_or_else(|| format!("`{shown}` has no `/` with the length of the range"))?;
        let address: IpAddr = address
            .parse()
            .map_err(|_| format!("`{shown}`: before the `/` is no address"))?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = length
            .parse()
            .ok()
            .filter(|length| *length <= bits)
            .ok_or_else(|| format!("`{shown}`: the length is no number from 0 to {bits}"))?;
        let label = Self {
            name: name.to_owned(),
            address,
            length,
        };
        let (first, length) = label.prefix();
        if first & u128::MAX.checked_shr(length.into()).unwrap_or_default() != 0 {
            return Err(format!(
                "`{shown}`: the address has bits beyond the length of the range"
            ));
        }
        Ok(label)
    }
}

impl fmt::Display for SubnetLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}/{}", self.name, self.address, self.length)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_shown() {
        for (text, first, length) in [
            ("office=10.1.0.0/16", "::ffff:10.1.0.0", 112),
            ("all of it=0.0.0.0/0", "::ffff:0.0.0.0", 96),
            ("one=192.0.2.1/32", "::ffff:192.0.2.1", 128),
            ("a=b=2001:db8::/32", "", 0),
            ("lab=2001:db8::/32", "2001:db8::", 32),
            ("any=::/0", "::", 0),
        ] {
            let Ok(label) = text.parse::<SubnetLabel>() else {
                assert!(first.is_empty(), "{text}");
                continue;
            };
            let first: std::net::Ipv6Addr = first.parse().unwrap();
            assert_eq!(label.prefix(), (u128::from(first), length), "{text}");
            assert_eq!(label.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_range_is_refused() {
        for text in [
            "",
            "10.0.0.0/8",
            "=10.0.0.0/8",
            "a=10.0.0.0",
            "a=10.0.0.0/33",
            "a=10.0.0.0/-1",
            "a=10.0.0.1/8",
            "a=::1/64",
            "a=name/8",
            "a=::/129",
        ] {
            assert!(text.parse::<SubnetLabel>().is_err(), "{text}");
        }
    }
}
