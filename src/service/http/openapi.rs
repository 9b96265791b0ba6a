//! The OpenAPI 3.1 document: made from the very routes that are served.

use axum::Router;
use axum::http::{HeaderValue, header};
use tower_http::set_header::SetResponseHeaderLayer;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, OpenApi as Document};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::{AppState, health};
use crate::job::spec::JobSpec;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secateur",
        description = "Makes large language models smaller by cutting whole layers, heals the cut, and proves what is left.\n\n\
            Errors are problem details (RFC 9457); every answer carries `x-request-id`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "/", description = "this service")),
    security((), ("api_key" = [])),
    tags(
        (name = "jobs", description = "Ask for a pruned model and follow the work"),
        (name = "results", description = "What a job found and left"),
        (name = "health", description = "How the service is"),
    ),
)]
struct Frame;

/// The routes that the document describes.
pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(Frame::openapi())
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// The whole document.
pub fn document() -> Document {
    finish(routes().split_for_parts().1)
}

/// Puts in what derives cannot say.
pub fn finish(mut document: Document) -> Document {
    document.info.version = env!("CARGO_PKG_VERSION").into();
    ApiKeyScheme.modify(&mut document);
    ClosedShapes.modify(&mut document);
    document
}

struct ApiKeyScheme;

impl Modify for ApiKeyScheme {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_with(|| ComponentsBuilder::new().build());
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.description = Some(
            "An API key, `sct_<id>_<secret>`. Without a configured key only this machine may call.".into(),
        );
        components.add_security_scheme("api_key", SecurityScheme::Http(bearer));
    }
}

/// The schemas a spec is really checked against.
struct ClosedShapes;

impl Modify for ClosedShapes {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_with(|| ComponentsBuilder::new().build());
        for (name, shape) in JobSpec::shapes().schemas() {
            let schema = serde_json::from_value(shape.clone()).expect("a schema reads back. This is a bug.");
            components.schemas.insert(name.clone(), schema);
        }
    }
}

/// The document for people to click through, its files inside the binary.
pub fn viewer() -> Router<AppState> {
    let policy =
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'";
    let policy =
        SetResponseHeaderLayer::overriding(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    Router::from(SwaggerUi::new("/docs").config(Config::from("/openapi.json"))).layer(policy)
}
