//! Webhook endpoints: who wants to hear of jobs.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Result, Tenant};

#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct EndpointRow {
    pub id: Uuid,
    pub url: String,
    /// Empty: everything.
    pub events: Vec<String>,
    pub description: Option<String>,
    /// `standard` or `cloudevents`.
    pub format: String,
    /// Sealed.
    pub secret: Vec<u8>,
    /// The one before, while messages are signed with it as well; sealed.
    pub old_secret: Option<Vec<u8>>,
    pub created_at: OffsetDateTime,
}

/// The columns of [`EndpointRow`]; an old secret whose time is over is none.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "select id, url, events, description, format, secret, created_at,
               case when old_secret_until > now() then old_secret end as old_secret from webhook_endpoints ",
            $rest
        )
    };
}

impl Database {
    /// Keeps an endpoint, if the tenant then has at most `most`. False: it would have more.
    pub async fn endpoint_insert(&self, tenant: Tenant, row: &EndpointRow, most: i64) -> Result<bool> {
        let done = sqlx::query(
            "insert into webhook_endpoints (id, tenant_id, url, events, description, format, secret)
             select $1, $2, $3, $4, $5, $6, $7
             where (select count(*) from webhook_endpoints where tenant_id = $2) < $8",
        )
        .bind(row.id)
        .bind(tenant)
        .bind(&row.url)
        .bind(&row.events)
        .bind(&row.description)
        .bind(&row.format)
        .bind(&row.secret)
        .bind(most)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    pub async fn endpoint(&self, tenant: Tenant, id: Uuid) -> Result<Option<EndpointRow>> {
        let row = sqlx::query_as(select!("where tenant_id = $1 and id = $2"))
            .bind(tenant)
            .bind(id)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row)
    }

    /// All endpoints of a tenant, newest first.
    pub async fn endpoints(&self, tenant: Tenant) -> Result<Vec<EndpointRow>> {
        let rows = sqlx::query_as(select!("where tenant_id = $1 order by id desc"))
            .bind(tenant)
            .fetch_all(&self.pool)
            .await?;
        Ok(rows)
    }

    /// Gives an endpoint another secret; the one before counts for another day. False when there is no such endpoint.
    pub async fn endpoint_rotate(&self, tenant: Tenant, id: Uuid, secret: &[u8]) -> Result<bool> {
        let done = sqlx::query(
            "update webhook_endpoints set old_secret = secret, old_secret_until = now() + interval '1 day', secret = $3
             where tenant_id = $1 and id = $2",
        )
        .bind(tenant)
        .bind(id)
        .bind(secret)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Forgets an endpoint and its messages. False when there is no such endpoint.
    pub async fn endpoint_delete(&self, tenant: Tenant, id: Uuid) -> Result<bool> {
        let done = sqlx::query("delete from webhook_endpoints where tenant_id = $1 and id = $2")
            .bind(tenant)
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() > 0)
    }
}
