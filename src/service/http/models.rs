//! Which models can be pruned.

use axum::Json;
use serde::Serialize;
use utoipa::ToSchema;

use crate::checkpoint::family::{FAMILIES, Family, ModelFamily};

/// Every family there is.
#[derive(Serialize, ToSchema)]
pub struct Models {
    /// Always `"list"`.
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<ModelFamily>,
}

/// Model families and what each supports. `secateur inspect DIR` tells the same of one checkpoint.
#[utoipa::path(
    get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "All families", body = Models))
)]
pub async fn list() -> Json<Models> {
    Json(Models { object: "list", data: FAMILIES.iter().map(Family::card).collect() })
}
