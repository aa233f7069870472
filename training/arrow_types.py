"""What a column of Parquet may hold for its purpose."""

import pyarrow as pa


def is_text(type: pa.DataType) -> bool:
    """Text."""
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)


def is_value(type: pa.DataType) -> bool:
    """A number, or text in which there may be one."""
    is_number = pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_decimal(type)
    return is_number or is_text(type) or pa.types.is_boolean(type) or pa.types.is_null(type)


def is_values(type: pa.DataType) -> bool:
    """A list of numbers, or text in which there may be one."""
    return is_text(type) or pa.types.is_null(type) or (_is_list(type) and is_value(type.value_type))


def _is_list(type: pa.DataType) -> bool:
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def is_nested_list(type: pa.DataType) -> bool:
    """A list of lists."""
    return _is_list(type) and _is_list(type.value_type)
