//! Who changed what, and when.

use time::OffsetDateTime;
use uuid::Uuid;

use super::{Database, Result, Tenant, page_cut};

/// A change that somebody asked for and got.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct AuditRow {
    pub id: Uuid,
    pub at: OffsetDateTime,
    /// Of the key; none: a program on this machine.
    pub key_id: Option<String>,
    /// Method and template of the route.
    pub action: String,
    /// The path of what it was done to, or of what was made.
    pub target: String,
    pub request_id: String,
}

impl Database {
    /// Notes a change, at the database's time.
    pub async fn audit_note(
        &self,
        tenant: Tenant,
        key: Option<&str>,
        action: &str,
        target: &str,
        request: &str,
    ) -> Result<()> {
        sqlx::query(
            "insert into audit (id, tenant_id, key_id, action, target, request_id) values ($1, $2, $3, $4, $5, $6)",
        )
        .bind(Uuid::now_v7())
        .bind(tenant)
        .bind(key)
        .bind(action)
        .bind(target)
        .bind(request)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// One page of at most `limit` changes, newest first, from behind `after`; and whether there are more.
    pub async fn audit_list(
        &self,
        tenant: Tenant,
        after: Option<Uuid>,
        limit: u32,
    ) -> Result<(Vec<AuditRow>, bool)> {
        let mut rows: Vec<AuditRow> = sqlx::query_as(
            "select id, at, key_id, action, target, request_id from audit
             where tenant_id = $1 and ($2::uuid is null or id < $2) order by id desc limit $3",
        )
        .bind(tenant)
        .bind(after)
        .bind(i64::from(limit) + 1)
        .fetch_all(&self.pool)
        .await?;
        let more = page_cut(&mut rows, limit);
        Ok((rows, more))
    }

    /// Forgets changes that are more than a year old.
    pub(super) async fn forget_old_audit(&self) -> Result<()> {
        sqlx::query("delete from audit where at < now() - interval '400 days'").execute(&self.pool).await?;
        Ok(())
    }
}
