//! API keys: an id everybody may see and the digest of a secret.

use time::OffsetDateTime;

use super::{Database, Result, Tenant};

#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct ApiKeyRow {
    pub id: String,
    #[sqlx(rename = "tenant_id")]
    pub tenant: Tenant,
    pub name: String,
    /// Of the secret, 32 bytes.
    pub sha256: Vec<u8>,
    pub scopes: Vec<String>,
    pub created_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub last_used_at: Option<OffsetDateTime>,
}

#[derive(Debug, Clone)]
pub struct NewApiKey {
    pub id: String,
    pub tenant: Tenant,
    pub name: String,
    pub sha256: [u8; 32],
    pub scopes: Vec<String>,
    pub expires_at: Option<OffsetDateTime>,
}

impl Database {
    /// Keeps a key. A key with this id takes the new values: a key given to the
    /// process at its start is written at every start.
    pub async fn key_put(&self, key: &NewApiKey) -> Result<()> {
        sqlx::query(
            "insert into api_keys (id, tenant_id, name, sha256, scopes, expires_at) values ($1, $2, $3, $4, $5, $6)
             on conflict (id) do update set name = excluded.name, sha256 = excluded.sha256,
               scopes = excluded.scopes, expires_at = excluded.expires_at, revoked_at = null
             where api_keys.tenant_id = excluded.tenant_id",
        )
        .bind(&key.id)
        .bind(key.tenant)
        .bind(&key.name)
        .bind(&key.sha256[..])
        .bind(&key.scopes)
        .bind(key.expires_at)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The key of this id, unless it is revoked or expired. The caller must
    /// still compare the secret; the tenant follows from the key.
    pub async fn key(&self, id: &str) -> Result<Option<ApiKeyRow>> {
        let row = sqlx::query_as(
            "select * from api_keys
             where id = $1 and revoked_at is null and (expires_at is null or expires_at > now())",
        )
        .bind(id)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row)
    }

    /// Notes that a key was used, to the minute.
    pub async fn key_used(&self, id: &str) -> Result<()> {
        sqlx::query(
            "update api_keys set last_used_at = now()
             where id = $1 and (last_used_at is null or last_used_at < now() - interval '1 minute')",
        )
        .bind(id)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// All keys of a tenant that are not revoked, newest first.
    pub async fn keys(&self, tenant: Tenant) -> Result<Vec<ApiKeyRow>> {
        let rows = sqlx::query_as(
            "select * from api_keys where tenant_id = $1 and revoked_at is null order by created_at desc, id",
        )
        .bind(tenant)
        .fetch_all(&self.pool)
        .await?;
        Ok(rows)
    }

    /// Ends a key. False when the tenant has none of this id.
    pub async fn key_revoke(&self, tenant: Tenant, id: &str) -> Result<bool> {
        let done = sqlx::query(
            "update api_keys set revoked_at = now() where tenant_id = $1 and id = $2 and revoked_at is null",
        )
        .bind(tenant)
        .bind(id)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    /// Whether there is any key that is not revoked. One that has expired opens nothing, and still keeps the door
    /// locked: time must not open it.
    pub async fn key_exists(&self) -> Result<bool> {
        let exists = sqlx::query_scalar("select exists (select from api_keys where revoked_at is null)")
            .fetch_one(&self.pool)
            .await?;
        Ok(exists)
    }

    /// Whether the tenant has a key of this scope that opens the door.
    pub async fn key_exists_with(&self, tenant: Tenant, scope: &str) -> Result<bool> {
        let exists = sqlx::query_scalar(
            "select exists (select from api_keys where tenant_id = $1 and $2 = any (scopes)
               and revoked_at is null and (expires_at is null or expires_at > now()))",
        )
        .bind(tenant)
        .bind(scope)
        .fetch_one(&self.pool)
        .await?;
        Ok(exists)
    }
}
