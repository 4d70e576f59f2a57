"""The registry's tables.

A message that is only ever returned whole is kept serialized, as the contract keeps it readable; what queries need has
a column. Times are microseconds since 1970, UTC.
"""

import time
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from penstock.api.registry.v1 import deployment_service_pb2, model_pb2


class Base(DeclarativeBase):
    """Every constraint has a name, so that a later migration can refer to it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: BigInteger, str: Text, bytes: LargeBinary}  # noqa: RUF012  # SQLAlchemy's own protocol


class State(Base):
    """The one row that every change locks. It makes the changes of several registries as serial as SQLite's own."""

    __tablename__ = "state"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    revision: Mapped[int]


class Model(Base):
    """A model; `latest_version` is the highest number ever given to one of its versions."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    description: Mapped[str]
    latest_version: Mapped[int]
    create_time_us: Mapped[int]

    def message(self) -> model_pb2.Model:
        return model_pb2.Model(
            name=self.name,
            description=self.description,
            latest_version=self.latest_version,
            create_time=timestamp(self.create_time_us),
        )


class Version(Base):
    """A version; `content` is its serialized message."""

    __tablename__ = "versions"

    model: Mapped[str] = mapped_column(String(63), ForeignKey("models.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    request_id: Mapped[str | None] = mapped_column(String(64), unique=True)
    content: Mapped[bytes]

    def message(self) -> model_pb2.Version:
        return model_pb2.Version.FromString(self.content)


class VersionBlob(Base):
    """Says that a version refers to a blob."""

    __tablename__ = "version_blobs"
    __table_args__ = (
        ForeignKeyConstraint(["model", "number"], ["versions.model", "versions.number"]),
        Index(None, "model", "number"),
    )

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Alias(Base):
    """Where an alias points now."""

    __tablename__ = "aliases"
    __table_args__ = (ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.number"]),)

    model: Mapped[str] = mapped_column(String(63), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    version: Mapped[int]
    update_time_us: Mapped[int]

    def message(self) -> model_pb2.Alias:
        return model_pb2.Alias(
            model=self.model, name=self.name, version=self.version, update_time=timestamp(self.update_time_us)
        )


class AliasMove(Base):
    """One move of an alias; the newest has the highest id."""

    __tablename__ = "alias_moves"
    __table_args__ = (Index(None, "model", "alias", "id"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    model: Mapped[str] = mapped_column(String(63), ForeignKey("models.name"))
    alias: Mapped[str] = mapped_column(String(63))
    from_version: Mapped[int]
    to_version: Mapped[int]
    reason: Mapped[str]
    time_us: Mapped[int]

    def message(self) -> model_pb2.AliasMove:
        return model_pb2.AliasMove(
            from_version=self.from_version,
            to_version=self.to_version,
            reason=self.reason,
            time=timestamp(self.time_us),
        )


class Deployment(Base):
    """A model's deployment; `content` is its serialized message."""

    __tablename__ = "deployments"

    model: Mapped[str] = mapped_column(String(63), ForeignKey("models.name"), primary_key=True)
    content: Mapped[bytes]

    def message(self) -> deployment_service_pb2.Deployment:
        return deployment_service_pb2.Deployment.FromString(self.content)


class Audit(Base):
    """One change, written in its transaction and never touched again.

    `request_id` joins it with the access log, which knows the peer. `before` and `after` are the resource's message as
    JSON; null where there was or is none.
    """

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    time_us: Mapped[int]
    request_id: Mapped[str | None] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    resource: Mapped[str] = mapped_column(String(160))
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


def now_us() -> int:
    return time.time_ns() // 1000


def timestamp(time_us: int) -> Timestamp:
    message = Timestamp()
    message.FromMicroseconds(time_us)
    return message
