//! Webhooks by Standard Webhooks (standardwebhooks.com): signed, small, never redirected.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;
use time::OffsetDateTime;
use ureq::unversioned::transport::DefaultConnector;
use uuid::Uuid;

use super::address::{Guard, Reach};
use super::call::{Result, accepted, beside};
use crate::service::db::{Database, EndpointRow, Message};
use crate::service::seal::Seal;

/// From looking the name up to the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// How a secret is shown to its owner, once.
pub fn shown(secret: &[u8]) -> String {
    format!("whsec_{}", STANDARD.encode(secret))
}

/// The signature of a message under one secret.
pub fn signature(secret: &[u8], id: Uuid, timestamp: i64, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let tag = hmac::sign(&key, format!("{id}.{timestamp}.{body}").as_bytes());
    format!("v1,{}", STANDARD.encode(tag.as_ref()))
}

/// A client that calls what `reach` allows, follows no redirect and uses no proxy.
pub fn agent(reach: Reach) -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .max_idle_connections(0)
        .proxy(None)
        .user_agent(concat!("secateur/", env!("CARGO_PKG_VERSION")))
        .build();
    ureq::Agent::with_parts(config, DefaultConnector::default(), Guard::new(reach))
}

/// Tries to deliver a message once. Gives the status of the answer.
pub async fn deliver(database: &Database, seal: &Seal, reach: Reach, message: &Message) -> Result<u16> {
    let endpoint = message.endpoint_id.ok_or_else(|| "the message names no endpoint".to_owned())?;
    let row = database.endpoint(message.tenant, endpoint).await?;
    let row = row.ok_or_else(|| "the endpoint is gone".to_owned())?;
    let signatures = signatures(seal, &row, message)?;
    reach.check(&row.url).map_err(|error| format!("the URL {error}"))?;
    let (id, body) = (message.id, message.body.clone());
    beside(move || send(&agent(reach), &row, id, &signatures, &body)).await
}

struct Signed {
    timestamp: i64,
    /// One for each secret that counts.
    signatures: String,
}

fn signatures(seal: &Seal, row: &EndpointRow, message: &Message) -> Result<Signed> {
    let timestamp = OffsetDateTime::now_utc().unix_timestamp();
    let mut signatures = Vec::new();
    for sealed in std::iter::once(&row.secret).chain(&row.old_secret) {
        let secret = seal.unseal(row.id.as_bytes(), sealed).map_err(|e| e.to_string())?;
        signatures.push(signature(&secret, message.id, timestamp, &message.body));
    }
    Ok(Signed { timestamp, signatures: signatures.join(" ") })
}

fn send(agent: &ureq::Agent, row: &EndpointRow, id: Uuid, signed: &Signed, body: &str) -> Result<u16> {
    let kind = match row.format.as_str() {
        "cloudevents" => "application/cloudevents+json",
        _ => "application/json",
    };
    let request = agent
        .post(&row.url)
        .header("content-type", kind)
        .header("webhook-id", id.to_string())
        .header("webhook-timestamp", signed.timestamp.to_string())
        .header("webhook-signature", &signed.signatures);
    Ok(accepted("the receiver", request.send(body))?.status().as_u16())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_name_stands_for_is_asked_at_the_call_and_refused_there() {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let served = std::thread::spawn(move || {
            for stream in listener.incoming().take(2) {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 1000]).unwrap();
                stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").unwrap();
            }
        });
        for url in [format!("http://127.0.0.1:{port}/"), format!("http://localhost:{port}/")] {
            let refused = agent(Reach::Public).get(&url).call().unwrap_err();
            assert!(refused.to_string().contains("no address that may be called"), "{url}: {refused}");
            assert_eq!(agent(Reach::Private).get(&url).call().unwrap().status(), 204, "{url}");
        }
        let secrets =
            agent(Reach::Private).get("http://169.254.169.254/latest/meta-data").call().unwrap_err();
        assert!(secrets.to_string().contains("no address that may be called"), "{secrets}");
        served.join().unwrap();
    }

    /// The example of the specification's own libraries.
    #[test]
    fn a_signature_is_what_standard_webhooks_says() {
        let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let key = hmac::Key::new(hmac::HMAC_SHA256, &secret);
        let tag = hmac::sign(&key, b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{\"test\": 2432232314}");
        assert_eq!(STANDARD.encode(tag.as_ref()), "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!(shown(&secret), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
    }
}
