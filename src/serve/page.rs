//! The page at `/`: a chat, in one file that asks nobody but this server.

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};

const PAGE: &str = include_str!("page.html");

/// What the page may do: run what is in it, and talk to where it came from.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) async fn page() -> Response {
    ([(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-cache")], Html(PAGE)).into_response()
}

#[cfg(test)]
mod tests {
    use super::PAGE;

    #[test]
    fn the_page_asks_nobody_else() {
        assert!(PAGE.len() < 40_000);
        for outside in ["http://", "https://", "//cdn", "import ", "@import", "url(", " src="] {
            assert!(!PAGE.contains(outside), "{outside}");
        }
    }
}
