//! Where outgoing calls may go: to hosts of the public network, or wherever the operator allows.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// Whether receivers may be inside: on this machine or in a private network, at any port, without TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Public,
    Private,
}

impl Reach {
    /// Whether `url` can be a receiver at all. What its name stands for is asked anew at each call.
    pub fn check(self, url: &str) -> Result<(), String> {
        let uri: Uri = url.parse().map_err(|e| format!("is no URL: {e}"))?;
        let scheme = uri.scheme_str().unwrap_or_default();
        let authority = uri.authority().ok_or("must be a whole URL, such as https://example.com/hook")?;
        if authority.as_str().contains('@') {
            return Err("must not hold a password; messages are signed instead".into());
        }
        if self == Self::Private {
            return match scheme {
                "http" | "https" => Ok(()),
                _ => Err("must begin with https:// or http://".into()),
            };
        }
        if scheme != "https" {
            return Err("must begin with https://".into());
        }
        if uri.port_u16().is_some_and(|port| port != 443) {
            return Err("must use port 443".into());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        match host.parse::<IpAddr>() {
            Ok(address) if !is_public(address) => Err("must be a public address".into()),
            Ok(_) => Ok(()),
            // Names that never leave this network, and numbers in a disguise that a resolver may take for one.
            Err(_) if host.ends_with("localhost") || host.ends_with(".internal") || !host.contains('.') => {
                Err("must be a public host".into())
            }
            Err(_) if host.rsplit('.').next().is_some_and(looks_like_number) => {
                Err("must be a name or an address as usually written".into())
            }
            Err(_) => Ok(()),
        }
    }
}

fn looks_like_number(label: &str) -> bool {
    label.bytes().all(|b| b.is_ascii_digit()) || label.starts_with("0x")
}

/// Looks names up, and gives only addresses that may be called: the very ones that are then called, so that a name
/// which changes its mind gains nothing.
#[derive(Debug)]
pub struct Guard {
    reach: Reach,
    inner: DefaultResolver,
}

impl Guard {
    pub fn new(reach: Reach) -> Self {
        Self { reach, inner: DefaultResolver::default() }
    }
}

impl Resolver for Guard {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.inner.resolve(uri, config, timeout)?;
        let mut allowed = self.empty();
        for address in &found {
            if self.reach == Reach::Private && !is_link_local(address.ip()) || is_public(address.ip()) {
                allowed.push(*address);
            }
        }
        if allowed.is_empty() {
            let text = "the host has no address that may be called from here";
            return Err(ureq::Error::Io(std::io::Error::new(std::io::ErrorKind::PermissionDenied, text)));
        }
        Ok(allowed)
    }
}

/// Where clouds tell machines their secrets.
fn is_link_local(address: IpAddr) -> bool {
    match unwrapped(address) {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Whether an address belongs to the public network, by the registries of special-purpose addresses (RFC 6890).
pub fn is_public(address: IpAddr) -> bool {
    match unwrapped(address) {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => {
            let [a, b, ..] = v6.segments();
            let global = a & 0xe000 == 0x2000;
            // Teredo, ORCHID and others below 2001::/23; documentation.
            let special = a == 0x2001 && (b < 0x0200 || b == 0x0db8) || a == 0x3fff && b < 0x1000;
            global && !special
        }
    }
}

/// The IPv4 address within an IPv6 one that stands for it: mapped, compatible, NAT64, 6to4.
fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let v4 = |high: u16, low: u16| IpAddr::V4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match v6.segments() {
        _ if v6 == Ipv6Addr::LOCALHOST || v6.is_unspecified() => address,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        [0x2002, high, low, ..] => v4(high, low),
        _ => address,
    }
}

fn is_public_v4(v4: Ipv4Addr) -> bool {
    let [a, b, c, _] = v4.octets();
    let special = v4.is_private()
        || v4.is_loopback()
        || v4.is_link_local()
        || v4.is_multicast()
        || v4.is_documentation()
        || a == 0
        || a >= 240
        // Shared by carriers, protocol assignments, relays, benchmarks.
        || a == 100 && b & 0xc0 == 64
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 88, 99)
        || a == 198 && b & 0xfe == 18;
    !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_the_public_network_are_public() {
        for public in ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101", "2002:0101:0101::1"]
        {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for inside in [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "203.0.113.9",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::1",
            "2002:a9fe:a9fe::",
            "2001:db8::1",
            "2001::1",
            "100::1",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
    }

    #[test]
    fn a_receiver_is_a_whole_https_url_of_a_public_host() {
        for fine in ["https://example.com/hook", "https://hooks.example.com:443/a?b=c", "https://1.1.1.1/"] {
            assert_eq!(Reach::Public.check(fine), Ok(()), "{fine}");
        }
        for wrong in [
            "",
            "nothing",
            "/hook",
            "http://example.com/",
            "ftp://example.com/",
            "https://example.com:8443/",
            "https://user:word@example.com/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://localhost/",
            "https://a.localhost/",
            "https://intranet/",
            "https://metadata.google.internal/",
            "https://2130706433/",
            "https://0x7f000001/",
            "https://0x7f.1/",
            "https://127.1/",
            "https://0177.0.0.1/",
            "https://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            "https:///hook",
        ] {
            assert!(Reach::Public.check(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Reach::Private.check("http://127.0.0.1:9000/hook"), Ok(()));
        assert!(Reach::Private.check("file:///etc/passwd").is_err());
        assert!(Reach::Private.check("http://a:b@127.0.0.1/").is_err());
    }
}
