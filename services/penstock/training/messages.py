"""The converter's results as messages of the contract, which they mirror field for field."""

from dataclasses import asdict

from penstock.api.types.v1.parity_pb2 import ParityReport as ParityMessage
from penstock.api.types.v1.signature_pb2 import Dimension, TensorSpec
from penstock.api.types.v1.signature_pb2 import Signature as SignatureMessage
from penstock.converters import ParityReport, Signature


def parity_message(report: ParityReport) -> ParityMessage:
    return ParityMessage(**asdict(report))


def signature_message(signature: Signature) -> SignatureMessage:
    inputs, outputs = (
        [
            TensorSpec(
                name=spec.name,
                datatype=spec.datatype,
                shape=[Dimension(name=axis) if isinstance(axis, str) else Dimension(size=axis) for axis in spec.shape],
            )
            for spec in specs
        ]
        for specs in (signature.inputs, signature.outputs)
    )
    return SignatureMessage(inputs=inputs, outputs=outputs)
