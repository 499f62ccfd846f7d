//! Requests to a hub: who is asked, as whom, how often again, and what its answers mean.

use std::io::Read;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use ureq::http::{HeaderMap, Method, Request, StatusCode};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{ModelName, Settings};
use crate::files;

/// Requests that may fail one after the other before it is given up.
pub(super) const TRIES: u32 = 5;

/// Redirections of one request; the Hub has one or two.
const MOST_REDIRECTIONS: usize = 10;

/// The longest wait that a hub may ask for, seconds.
const LONGEST_WAIT: u64 = 120;

/// Bytes of an answer that lists a model's files.
const MAX_JSON: u64 = 32 << 20;

/// Bytes of a file of certificates.
const MAX_CERTIFICATES: u64 = 8 << 20;

/// Why there is no answer.
pub(super) enum Failure {
    /// No answer, or only that it cannot be given now.
    Unreachable(String),
    /// Nobody is there: to ask again is of no use.
    Away(String),
    /// The answer is no.
    Refused(anyhow::Error),
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unreachable(why) | Failure::Away(why) => anyhow!(why),
            Failure::Refused(error) => error,
        }
    }
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    headers: HeaderMap,
    pub(super) body: Body,
}

impl Answer {
    /// A header's text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// A header's number.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.trim().parse().ok()
    }
}

/// One who asks.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    pub(super) pause: Duration,
}

impl Client {
    pub(super) fn new(settings: &Settings) -> Result<Self> {
        let patience = Some(settings.patience);
        let mut tls = TlsConfig::builder();
        if let Some(path) = &settings.certificates {
            tls = tls.root_certs(certificates(path)?);
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, where it is known who may see the token.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("decdec/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience)
            .tls_config(tls.build())
            .build();
        let (endpoint, token) = (settings.endpoint.clone(), settings.token.clone());
        Ok(Self { agent: config.new_agent(), endpoint, token, pause: settings.pause })
    }

    /// The JSON at `url`.
    pub(super) fn json(&self, url: &str, model: &ModelName) -> Result<Value, Failure> {
        let answer = self.patiently(|| self.ask(Method::GET, url, 0, true), model)?;
        let mut text = Vec::new();
        let read = answer.body.into_reader().take(MAX_JSON).read_to_end(&mut text);
        read.map_err(|error| Failure::Unreachable(error.to_string()))?;
        serde_json::from_slice(&text)
            .map_err(|_| Failure::Refused(anyhow!("{url} does not answer with JSON, is HF_ENDPOINT right?")))
    }

    /// What is at `url`: status and headers of the hub's own answer, not of the host that it sends to.
    pub(super) fn head(&self, url: &str, model: &ModelName) -> Result<Answer, Failure> {
        self.patiently(|| self.ask(Method::HEAD, url, 0, false), model)
    }

    /// The bytes at `url` from one of them on.
    pub(super) fn bytes(&self, url: &str, from: u64, model: &ModelName) -> Result<Answer, Failure> {
        self.patiently(|| self.ask(Method::GET, url, from, true), model)
    }

    /// Asks until there is an answer that will stay the same.
    fn patiently(&self, ask: impl Fn() -> Result<Answer, Failure>, model: &ModelName) -> Result<Answer, Failure> {
        let mut pause = self.pause;
        for left in (0..TRIES).rev() {
            let (why, wait) = match ask() {
                Ok(answer) if answer.status == StatusCode::TOO_MANY_REQUESTS => {
                    let asked = answer.number("retry-after").map(Duration::from_secs);
                    (format!("{} has had too many requests (429)", self.endpoint), asked)
                }
                Ok(answer) if answer.status.is_server_error() => {
                    (format!("{} answers {}", self.endpoint, answer.status), None)
                }
                Ok(answer) => return self.understood(answer, model),
                Err(Failure::Unreachable(why)) => (why, None),
                Err(other) => return Err(other),
            };
            let wait = wait.unwrap_or(pause);
            if wait.as_secs() > LONGEST_WAIT {
                let seconds = wait.as_secs();
                let error =
                    anyhow!("{why} and asks to wait {seconds} s: try again then; HF_TOKEN allows more requests");
                return Err(Failure::Refused(error));
            }
            if left == 0 {
                return Err(Failure::Unreachable(why));
            }
            tracing::warn!("{why}, asking again in {:.1} s", wait.as_secs_f64());
            std::thread::sleep(wait);
            pause *= 2;
        }
        Err(Failure::Unreachable("nobody was asked".into()))
    }

    /// One request, and those that it is redirected to; on other hosts only if `elsewhere`.
    fn ask(&self, method: Method, url: &str, from: u64, elsewhere: bool) -> Result<Answer, Failure> {
        let mut url = url.to_owned();
        for _ in 0..MOST_REDIRECTIONS {
            let answer = self.once(&method, &url, from)?;
            let Some(place) = answer.header("location").filter(|_| answer.status.is_redirection()) else {
                return Ok(answer);
            };
            let next = if place.starts_with('/') { format!("{}{place}", origin(&url)) } else { place.to_owned() };
            if !elsewhere && origin(&next) != origin(&url) {
                return Ok(answer);
            }
            url = next;
        }
        Err(Failure::Refused(anyhow!("{url} redirects in circles")))
    }

    /// One request.
    fn once(&self, method: &Method, url: &str, from: u64) -> Result<Answer, Failure> {
        let mut request = Request::builder().method(method).uri(url);
        if let Some(token) = self.token.as_ref().filter(|_| origin(url) == origin(&self.endpoint)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        let wrong = |error: ureq::http::Error| {
            let what = if url.starts_with(&self.endpoint) { "is HF_ENDPOINT or HF_TOKEN wrong?" } else { "try again" };
            Failure::Refused(anyhow!("cannot ask {url} ({error}): {what}"))
        };
        match self.agent.run(request.body(()).map_err(wrong)?) {
            Ok(response) => {
                let (parts, body) = response.into_parts();
                Ok(Answer { status: parts.status, headers: parts.headers, body })
            }
            Err(error @ (ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl)) => {
                Err(Failure::Refused(anyhow!("cannot ask {url}: {error}, is HF_ENDPOINT right?")))
            }
            Err(error @ (ureq::Error::HostNotFound | ureq::Error::ConnectionFailed)) => {
                Err(Failure::Away(error.to_string()))
            }
            Err(ureq::Error::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(Failure::Away(error.to_string()))
            }
            Err(error) => Err(Failure::Unreachable(error.to_string())),
        }
    }

    /// The answer, or what it means that there is none.
    fn understood(&self, answer: Answer, model: &ModelName) -> Result<Answer, Failure> {
        let (status, code) = (answer.status, answer.header("x-error-code").unwrap_or_default());
        let (endpoint, repository) = (&self.endpoint, model.repository());
        let error = match status.as_u16() {
            _ if status.is_success() || status.is_redirection() => return Ok(answer),
            // More than there is was asked for: the download sees to that.
            416 => return Ok(answer),
            401 | 403 if code == "GatedRepo" => anyhow!(
                "{repository} is gated ({}): ask for access on {endpoint}/{repository}, and set HF_TOKEN to a token of yours",
                status.as_u16()
            ),
            401 | 403 if self.token.is_some() => anyhow!(
                "{endpoint} does not show {repository} to your token ({}): is the name right, and may the token (HF_TOKEN, \
                 or hf auth login) read it?",
                status.as_u16()
            ),
            401 | 403 => anyhow!(
                "{endpoint} does not show {repository} without a token ({}): is the name right? for a private or gated \
                 model set HF_TOKEN",
                status.as_u16()
            ),
            404 if code == "RevisionNotFound" => {
                anyhow!("{repository} has no revision {} (404): leave @{} out", model.revision(), model.revision())
            }
            404 => anyhow!("there is no {model} on {endpoint} (404), nor a file or directory of that name here"),
            _ => anyhow!("{endpoint} answers {status} when asked for {model}"),
        };
        Err(Failure::Refused(error))
    }
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// The certificates in a PEM file.
fn certificates(path: &std::path::Path) -> Result<RootCerts> {
    let cannot = || format!("cannot read the certificates in {} (SSL_CERT_FILE)", path.display());
    let pem = files::read(path, MAX_CERTIFICATES).with_context(cannot)?;
    let mut found: Vec<Certificate<'static>> = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.with_context(cannot)? {
            found.push(certificate);
        }
    }
    ensure!(!found.is_empty(), "{}: there are none", cannot());
    Ok(RootCerts::new_with_certs(&found))
}

#[cfg(test)]
mod tests {
    use super::origin;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        for (url, wanted) in [
            ("https://a.b/c/d", "https://a.b"),
            ("http://127.0.0.1:80/x", "http://127.0.0.1:80"),
            ("http://a?b/c", "http://a"),
            ("http://a", "http://a"),
        ] {
            assert_eq!(origin(url), wanted);
        }
        assert_ne!(origin("https://hub.co.evil.com/x"), origin("https://hub.co/x"));
        assert_ne!(origin("http://hub.co/x"), origin("https://hub.co/x"));
    }
}
