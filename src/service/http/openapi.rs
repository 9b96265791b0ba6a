//! The OpenAPI 3.1 document: made from the very routes that are served.

use axum::Router;
use axum::http::{HeaderValue, Method, header};
use tower_http::set_header::SetResponseHeaderLayer;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, Content, OpenApi as Document, Ref, RefOr, ResponseBuilder};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use utoipa_swagger_ui::{Config, SwaggerUi};

use super::auth::Scope;
use super::{
    AppState, artifacts, audit, bundle, create, events, health, hub, jobs, keys, models, plans, results,
    sinks, sweeps, uploads, webhooks, workers,
};
use crate::job::shape::Shapes;
use crate::job::spec::JobSpec;
use crate::job::sweep::SweepSpec;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "secateur",
        description = "Makes large language models smaller by cutting whole layers, heals the cut, and proves what is left.\n\n\
            Errors are problem details (RFC 9457); every answer carries `x-request-id`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    servers((url = "/", description = "this service")),
    tags(
        (name = "jobs", description = "Ask for a pruned model and follow the work"),
        (name = "results", description = "What a job found and left"),
        (name = "sweeps", description = "Many jobs at once, side by side"),
        (name = "uploads", description = "Texts that you bring"),
        (name = "hub", description = "Results as the Hugging Face Hub serves models: set `HF_ENDPOINT` to this service's `/hf`"),
        (name = "webhooks", description = "Who wants to hear of jobs"),
        (name = "keys", description = "Who may call, and who changed what"),
        (name = "workers", description = "What there is to compute on"),
        (name = "models", description = "What can be pruned"),
        (name = "health", description = "How the service is"),
    ),
)]
struct Frame;

/// The routes that the document describes.
pub fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(Frame::openapi())
        .merge(create::routes())
        .merge(jobs::routes())
        .merge(events::routes())
        .merge(results::routes())
        .merge(artifacts::routes())
        .merge(sinks::routes())
        .merge(bundle::routes())
        .merge(plans::routes())
        .merge(sweeps::routes())
        .merge(uploads::routes())
        .merge(hub::routes())
        .merge(webhooks::routes())
        .merge(keys::routes())
        .merge(audit::routes())
        .routes(routes!(workers::list))
        .routes(routes!(models::list))
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
    // axum marks a parameter that spans slashes, OpenAPI has no word for it.
    let paths = std::mem::take(&mut document.paths.paths);
    document.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    ApiKeyScheme.modify(&mut document);
    ClosedShapes.modify(&mut document);
    Problems.modify(&mut document);
    Scopes.modify(&mut document);
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
        let sweep = Shapes::of::<SweepSpec>();
        for (name, shape) in JobSpec::shapes().schemas().iter().chain(sweep.schemas()) {
            let schema = serde_json::from_value(shape.clone()).expect("a schema reads back. This is a bug.");
            components.schemas.insert(name.clone(), schema);
        }
    }
}

/// Each operation names the scope that a key needs for it.
struct Scopes;

impl Modify for Scopes {
    fn modify(&self, document: &mut Document) {
        for (path, item) in &mut document.paths.paths {
            for (method, operation) in operations(item) {
                let open = SecurityRequirement::default();
                operation.security = Some(match Scope::needed(&method, path) {
                    Some(scope) => vec![open, SecurityRequirement::new("api_key", [scope.name()])],
                    None => vec![open],
                });
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = (Method, &mut Operation)> {
    let PathItem { get, post, put, delete, patch, .. } = item;
    [
        (Method::GET, get),
        (Method::POST, post),
        (Method::PUT, put),
        (Method::DELETE, delete),
        (Method::PATCH, patch),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
}

/// Every operation may answer with a problem, and a problem has its own media type.
struct Problems;

impl Modify for Problems {
    fn modify(&self, document: &mut Document) {
        for item in document.paths.paths.values_mut() {
            for (_, operation) in operations(item) {
                let other = ResponseBuilder::new()
                    .description(
                        "Any other refusal or failure, e.g. 401 without a key, 503 without a database",
                    )
                    .content(
                        "application/problem+json",
                        Content::new(Some(Ref::from_schema_name("ProblemBody"))),
                    );
                operation.responses.responses.insert("default".into(), other.build().into());
                for (status, response) in &mut operation.responses.responses {
                    let refusal = status.starts_with(['4', '5']);
                    if let (RefOr::T(response), true) = (response, refusal) {
                        let content = std::mem::take(&mut response.content);
                        let told = content.into_values().map(|c| ("application/problem+json".to_string(), c));
                        response.content.extend(told);
                    }
                }
            }
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
