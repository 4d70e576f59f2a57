"""Core, merging, normalizing, regularizing and reshaping layers."""

import keras
from keras import layers
from tests.conformance.keras.case import Case, around


def adapted() -> layers.SpectralNormalization:
    return layers.SpectralNormalization(layers.Dense(3))


def repeated_embedding() -> keras.Model:
    embedding = layers.ReversibleEmbedding(11, 4)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    return keras.Model(tokens, embedding(embedding(tokens), reverse=True))


CASES = [
    Case("Activation", lambda: around(layers.Activation("tanh"), (5,))),
    Case("ActivityRegularization", lambda: around(layers.ActivityRegularization(l2=0.1), (5,))),
    Case("Add", lambda: around(layers.Add(), (5,), (5,))),
    Case("AlphaDropout", lambda: around(layers.AlphaDropout(0.5), (5,))),
    Case("Average", lambda: around(layers.Average(), (5,), (5,), (5,))),
    Case("BatchNormalization", lambda: around(layers.BatchNormalization(), (4, 4, 3))),
    Case("Concatenate", lambda: around(layers.Concatenate(axis=1), (5, 2), (3, 2))),
    Case("Cropping1D", lambda: around(layers.Cropping1D((1, 2)), (7, 3))),
    Case("Cropping2D", lambda: around(layers.Cropping2D(((1, 2), (0, 1))), (None, None, 3))),
    Case("Cropping3D", lambda: around(layers.Cropping3D(1), (5, 6, 7, 2))),
    Case("Dense", lambda: around(layers.Dense(3), (None, 5))),
    Case("Dot", lambda: around(layers.Dot(axes=(1, 2), normalize=True), (5, 3), (4, 5))),
    Case("Dropout", lambda: around(layers.Dropout(0.5), (5,))),
    Case("ELU", lambda: around(layers.ELU(0.7), (5,))),
    Case("EinsumDense", lambda: around(layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (None, 4))),
    Case("Embedding", lambda: around(layers.Embedding(11, 4), (None,), dtype="int32")),
    Case("Flatten", lambda: around(layers.Flatten(), (3, 4, 2))),
    Case("GaussianDropout", lambda: around(layers.GaussianDropout(0.5), (5,))),
    Case("GaussianNoise", lambda: around(layers.GaussianNoise(0.5), (5,))),
    Case("GroupNormalization", lambda: around(layers.GroupNormalization(2), (5, 4, 6))),
    Case("Identity", lambda: around(layers.Identity(), (5,))),
    Case("LayerNormalization", lambda: around(layers.LayerNormalization(), (None, 6))),
    Case("LeakyReLU", lambda: around(layers.LeakyReLU(0.2), (5,))),
    Case("Masking", lambda: around(layers.Masking(), (4, 3))),
    Case("Maximum", lambda: around(layers.Maximum(), (5,), (5,))),
    Case("Minimum", lambda: around(layers.Minimum(), (5,), (5,))),
    Case("Multiply", lambda: around(layers.Multiply(), (5,), (1,))),
    Case("PReLU", lambda: around(layers.PReLU(alpha_initializer="glorot_uniform"), (5, 3))),
    Case("Permute", lambda: around(layers.Permute((3, 1, 2)), (2, 3, 4))),
    Case("RMSNormalization", lambda: around(layers.RMSNormalization(), (None, 6))),
    Case("ReLU", lambda: around(layers.ReLU(max_value=1.0, negative_slope=0.1, threshold=0.2), (5,))),
    Case("RepeatVector", lambda: around(layers.RepeatVector(3), (5,))),
    Case("Reshape", lambda: around(layers.Reshape((-1, 2)), (3, 4))),
    Case("ReversibleEmbedding", repeated_embedding),
    Case("Softmax", lambda: around(layers.Softmax(axis=1), (5, 3))),
    Case("SpatialDropout1D", lambda: around(layers.SpatialDropout1D(0.5), (5, 3))),
    Case("SpatialDropout2D", lambda: around(layers.SpatialDropout2D(0.5), (5, 4, 3))),
    Case("SpatialDropout3D", lambda: around(layers.SpatialDropout3D(0.5), (5, 4, 3, 2))),
    Case("SpectralNormalization", lambda: around(adapted(), (5,))),
    Case("Subtract", lambda: around(layers.Subtract(), (5,), (5,))),
    Case("TimeDistributed", lambda: around(layers.TimeDistributed(layers.Dense(3)), (4, 5))),
    Case("UnitNormalization", lambda: around(layers.UnitNormalization(), (5,))),
    Case("UpSampling1D", lambda: around(layers.UpSampling1D(2), (5, 3))),
    Case("UpSampling2D", lambda: around(layers.UpSampling2D((2, 3)), (5, 4, 3))),
    Case("UpSampling2D (bilinear)", lambda: around(layers.UpSampling2D(2, interpolation="bilinear"), (5, 4, 3))),
    Case("UpSampling3D", lambda: around(layers.UpSampling3D(2), (3, 4, 5, 2))),
    Case("ZeroPadding1D", lambda: around(layers.ZeroPadding1D((1, 2)), (5, 3))),
    Case("ZeroPadding2D", lambda: around(layers.ZeroPadding2D(((1, 0), (2, 1))), (None, None, 3))),
    Case("ZeroPadding3D", lambda: around(layers.ZeroPadding3D(1), (3, 4, 5, 2))),
    Case("Lambda", lambda: around(layers.Lambda(lambda x: x * 2, name="twice"), (5,))),
]
