//! The shape that all optional parts of the object share.

/// A struct of optional fields. `Option` throughout: what is not given is told apart from an explicit `false` or `0`.
macro_rules! object {
    ($($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $field:ident: $type:ty,)* })+) => {$(
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        $(#[$outer])*
        #[serde(rename_all = "camelCase")]
        pub struct $name {$(
            $(#[$inner])*
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $field: Option<$type>,
        )*}
    )+};
}

pub(crate) use object;
