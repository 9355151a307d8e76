//! The codec of the generated code: protobuf, with errors that blame the right side.
//!
//! tonic's own codec reports a message that does not decode as INTERNAL, as if the receiver were at fault.

use std::marker::PhantomData;

use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// Start of the message of a [`Status`] made for a message that is not valid protobuf.
pub const UNDECODABLE: &str = "message does not decode";

/// Protobuf codec whose decode errors are `INVALID_ARGUMENT` and name the field.
#[derive(Debug)]
pub struct StrictCodec<E, D> {
    types: PhantomData<fn(E) -> D>,
}

/// Encoder half of [`StrictCodec`].
#[derive(Debug)]
pub struct StrictEncoder<E> {
    types: PhantomData<fn(E)>,
}

/// Decoder half of [`StrictCodec`].
#[derive(Debug)]
pub struct StrictDecoder<D> {
    types: PhantomData<fn() -> D>,
}

impl<E, D> Default for StrictCodec<E, D> {
    fn default() -> Self {
        Self { types: PhantomData }
    }
}

impl<E, D> Codec for StrictCodec<E, D>
where
    E: prost::Message + 'static,
    D: prost::Message + Default + 'static,
{
    type Encode = E;
    type Decode = D;
    type Encoder = StrictEncoder<E>;
    type Decoder = StrictDecoder<D>;

    fn encoder(&mut self) -> Self::Encoder {
        StrictEncoder { types: PhantomData }
    }

    fn decoder(&mut self) -> Self::Decoder {
        StrictDecoder { types: PhantomData }
    }
}

impl<E: prost::Message> Encoder for StrictEncoder<E> {
    type Item = E;
    type Error = Status;

    fn encode(&mut self, item: E, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(dst)
            .map_err(|err| Status::internal(format!("message does not encode: {err}")))
    }
}

impl<D: prost::Message + Default> Decoder for StrictDecoder<D> {
    type Item = D;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<D>, Status> {
        D::decode(src)
            .map(Some)
            .map_err(|err| Status::invalid_argument(format!("{UNDECODABLE}: {err}")))
    }
}
