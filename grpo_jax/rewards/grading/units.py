r"""Splits a quantity into its expression and its unit, with one name for each unit."""

import re

from grpo_jax.rewards.grading.wording import NUMERALS

TEXT = r"\\text\{[^{}]*\}"
_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)"
# Spellings by the unit's name. `_unit` turns "square" and "cubic" into powers.
_UNITS = {
    "cm": "cm centimeter centimetre 厘米 公分", "m": "m meter metre 米",
    "mm": "mm millimeter millimetre 毫米", "km": "km kilometer kilometre 千米 公里",
    "dm": "dm decimeter decimetre 分米", "in": "in inch inches 英寸",
    "ft": "ft foot feet 英尺", "yd": "yd yard 码", "mi": "mi mile 英里",
    "kg": "kg kilogram 千克 公斤", "g": "g gram 克", "mg": "mg milligram 毫克",
    "t": "t ton tonne 吨", "lb": "lb lbs pound", "oz": "oz ounce",
    "l": "l liter litre 升", "ml": "ml milliliter millilitre 毫升",
    "s": "s sec second 秒 秒钟", "min": "min minute 分 分钟", "h": "h hr hour 小时 时",
    "day": "day 天 日", "week": "week 周 星期", "month": "month 月 个月",
    "year": "year yr 年", "dollar": "dollar usd buck 美元", "cent": "cent ¢ 美分",
    "yuan": "yuan rmb 元 块 块钱 人民币", "euro": "euro eur 欧元",
    "degree": r"degree deg 度 ^\circ", "°C": r"^\circc celsius 摄氏度 degreescelsius",
    "°F": r"^\circf fahrenheit degreesfahrenheit", "%": "% percent pct",
    "mph": "mph mi/h", "person": "person people 人",
    "": "unit 单位 approximately about around total approx 约 大约 共 一共",
}  # fmt: skip
UNIT_NAMES = {name: unit for unit, names in _UNITS.items() for name in names.split()}
_UNIT_END = re.compile(
    rf"(?:%|\^\\circ ?[CF]?|\^\{{\\circ\}} ?[CF]?|/?{TEXT}(?:\^\{{?[23]\}}?)?)$"
)


def split_quantity(text: str) -> tuple[str, str]:
    r"""Returns the expression and the name of its unit ("" if there is none).

    Args:
      text: an answer from `notation.normalize_notation`.

    >>> (split_quantity(r"15\text{centimeters}^2"),
    ...  split_quantity(r"20%"),
    ...  split_quantity(r"60^\circ"))
    (('15', 'cm^2'), ('20', '%'), ('60', 'degree'))
    """
    rest, units = text, []
    if lead := re.match(rf"(-?)({TEXT})(?=[-\d.(\\])", rest):
        units.append(lead[2][6:-1])
        rest = lead[1] + rest[lead.end() :]
    for _ in range(3):  # 50\text{cm}/\text{s}^2
        end = _UNIT_END.search(rest)
        trigonometric = end and "circ" in end.group() and re.search(_TRIG, rest)
        if not end or end.start() == 0 or trigonometric:
            break
        units.insert(0, re.sub(r"\\text\{([^{}]*)\}", r"\1", end.group()))
        rest = rest[: end.start()]
    if any(unit.startswith("/") for unit in units):
        units = ["".join(units)]
    if word := re.fullmatch(r"\\text\{(.*)\}", rest):
        rest = NUMERALS.get(word.group(1).lower(), rest)
    names = [name for name in map(_unit, units) if name]
    return rest, "%" if "%" in names else "*".join(names)


def _unit(words: str) -> str:
    words = re.sub("[{}]", "", words.lower()).strip(" .")
    power = ""
    for pattern, n in (
        (r"\^?2$", "2"),
        (r"\^?3$", "3"),
        (r"^(square|sq\.?|平方)\s*|\s*squared$", "2"),
        (r"^(cubic|cu\.?|立方)\s*|\s*cubed$", "3"),
    ):
        if re.search(pattern, words):
            power, words = n, re.sub(pattern, "", words).strip()
    words = re.sub(r"\s+per\s+|\s*/\s*|每", "/", words)
    names = []
    for word in words.split("/"):
        word = re.sub(r"^(of|the|a|an)\s+", "", word.strip())
        compact = re.sub(r"[\s.]+", "", word)
        single = compact[:-1] if compact.endswith("s") and len(compact) > 2 else compact
        names.append(UNIT_NAMES.get(compact, UNIT_NAMES.get(single, single)))
    unit = "/".join(names)
    unit = UNIT_NAMES.get(unit, unit)
    return unit + (f"^{power}" if power and unit else "")
