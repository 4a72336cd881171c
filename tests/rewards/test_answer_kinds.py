r"""Answers written in another way, kind by kind: what is equal, and what only looks so.

Each line is a prediction, = or # (equal or different) and a reference. Every pair is
graded in both directions.
"""

import re

import pytest

from grpo_jax.rewards import answers

PAIRS = r"""
-- a sign in words
\text{negative }7 # 7
\text{negative }7 = -7
负7 # 7
负7 = -7
minus 3 # 3
minus 3 = -3
\text{minus }\frac12 = -\frac{1}{2}
\text{Negative } 3.5 = -3.5
negative seven = -7
negative seven # 7
negative twenty-five = -25
负三 = -3
负三 # 3
负二十五 = -25
负3/4 = -\frac34
\text{负}\frac{3}{4} # \frac34
positive 7 = 7
\text{positive }7 # -7
正7 = 7
零下5 = -5
零下5℃ # 5
零下5度 = -5
5 degrees below zero = -5
5 degrees below zero # 5
负5米 = -5
plus or minus 3 = \pm 3
正负3 = \pm3
\text{plus or minus }3 # 3
positive or negative 3 = 3,-3
+/-3 = \pm 3
\text{negative infinity} = -\infty
负无穷 = -\infty
正无穷 # -\infty
7\text{ (negative)} # 7
7\text{的相反数} # 7
-- a comparator in words
\text{less than }7 # 7
\text{less than }7 = x<7
大于3 # 3
大于3 = x>3
x \text{ is greater than } 3 = (3,\infty)
\text{more than }7 # 7
\text{greater than or equal to }7 = x\ge7
\text{greater than or equal to }7 # x>7
大于等于3 = x\ge 3
大于或等于3 # x>3
小于3 # x\le 3
不小于3 = x\ge3
不大于3 = x\le3
不等于3 # 3
不等于3 = x\ne3
\text{not }7 # 7
不是7 # 7
\text{not equal to }7 = x \ne 7
<7 # 7
\ge 7 # 7
7+ # 7
-- a bound in words
\text{at least }7 # 7
\text{at most }7 # 7
\text{at least }7 = x\ge 7
至少7 # 7
至多7 = x\le7
不超过7 # 7
超过7 # 7
no more than 7 # 7
no less than 7 = x \ge 7
7 \text{ or more} # 7
7 \text{ or more} = x\ge7
7 or fewer # 7
7以上 # 7
7以下 # 7
7 and above # 7
between 3 and 7 # 3,7
between 3 and 7 # 3
\text{between }3\text{ and }7 = 3<x<7
3到7之间 # 3
3 to 7 # 3
3 to 7 # 7
3到7 # 37
3~7 # 3
up to 7 # 7
over 7 # 7
under 7 # 7
\text{at least }3, \text{at most }5 = 3\le x\le5
3\text{ at minimum} # 3
7以外 # 7
7 maybe 8 # 7
7 \text{ is wrong} # 7
-- a power or another operation in words
7 \text{ squared} # 7
7 \text{ squared} = 49
7 cubed = 343
7 cubed # 7
7的平方 = 49
7的平方 # 7
7的立方 = 343
7\text{ to the power of }3 # 7
7\text{ to the power of }3 = 7^3
7的3次方 = 343
7 factorial # 7
7 factorial = 5040
7的阶乘 # 7
\text{square root of }7 # 7
\text{the square root of }7 = \sqrt7
\text{cube root of }8 = 2
根号7 = \sqrt{7}
根号7 # 7
7的平方根 # 7
7的算术平方根 = \sqrt7
7的倒数 # 7
7的倒数 = 1/7
\text{reciprocal of }7 # 7
\text{half of }7 # 7
\text{half of }7 = 3.5
\text{twice }7 # 7
\text{double }7 # 7
7的一半 # 7
7的2倍 # 7
3 \text{ thirds} # 3
7 halves # 7
7 hundredths = 0.07
7‰ # 7
5\text{ plus }2 = 7
5\text{ plus }2 # 5
8\text{ divided by }2 = 4
8\text{ over }3 = \frac83
5 minus 2 = 3
3 to the fourth power = 81
the square of 7 = 49
the square of 7 # 7
7 choose 2 = 21
7 choose 2 # 7
\text{negative }\text{negative }7 = 7
3个半 # 3
3个半 = 3.5
-- what stays a unit
7\text{ cm squared} = 7\text{ cm}^2
7 square meters = 7
7 square meters # 7 meters
7\text{ more} = 7
7 less = 7
7 times = 7
7倍 = 7
7\text{ different ways} = 7
7个不同的数 = 7
7\text{ dozen} = 7
about 7 = 7
共7个 = 7
7左右 = 7
等于7 = 7
x的值为7 = 7
7th = 7
最小值是-3 = -3
最小值是-3 # 3
7 apples = 7
\text{She has }7\text{ eggs} = 7
7\text{ positive integers} = 7
7\text{ students in the class} = 7
-- or and and of inequalities
x>5 \text{ or } x<9 # 5<x<9
x>5 \text{ or } x<9 = \mathbb{R}
x>5 \text{ or } x<9 = (-\infty,\infty)
x>5 \text{ and } x<9 = 5<x<9
x>5 且 x<9 = (5,9)
x>5 或 x<9 # (5,9)
x>5 或 x<9 = \mathbb R
x<1 \text{ or } x>5 = (-\infty,1)\cup(5,\infty)
x<1 \text{ or } x>5 # 1<x<5
x<1, x>5 = x<1 \text{ or } x>5
x\le 3 \lor x\ge 3 = \mathbb{R}
x>5 \lor x<9 # 5<x<9
x>5 \land x<9 = (5,9)
x>5 \text{ or } x>7 = x>5
x>5 \text{ or } x>7 # x>7
x>5 \text{ and } x>7 = x>7
x>5 \text{ and } x>7 # x>5
x>\sqrt2 \text{ or } x<3 # \sqrt2<x<3
x>\sqrt2 \text{ and } x<3 = \sqrt2<x<3
x>\sqrt2, x<3 = (\sqrt{2},3)
x=1 \text{ or } x>3 = \{1\}\cup(3,\infty)
x=1 \text{ or } x>3 # x>3
x\ne 1 \text{ and } x\ne 2 = (-\infty,1)\cup(1,2)\cup(2,\infty)
x\ne 1 \text{ and } x\ne 2 # x\ne 1
x\ne 1 \text{ or } x\ne 2 = \mathbb{R}
x>5, y<9 # 5<x<9
x>1, y>2 # x>2
3 \text{ or } 5 = 3,5
3 or 5 # 3
1, 2, or 3 = 1,2,3
p=5,q=2 or p=7,q=2 = (5,2),(7,2)
|x|>3 = x<-3 \text{ or } x>3
|x|>3 # -3<x<3
|x|\ge 3 # x<-3 \text{ or } x>3
|x-1|<2 = (-1,3)
|x-1|<2 # (-3,1)
2>|x+1| = -3<x<1
-- powers and roots
(x-2)^{1/3} = \sqrt[3]{x-2}
(x-2)^{1/3} # \sqrt{x-2}
(x-2)^{1/3} # \sqrt[3]{2-x}
(x-2)^{1/3} # \sqrt[3]{x}-2
(x-2)^{\frac{2}{3}} = \sqrt[3]{(x-2)^2}
(x-2)^{2/3} = (\sqrt[3]{x-2})^2
(x-2)^{2/3} # \sqrt[3]{x-2}
(x-2)^{-1/3} = \frac{1}{\sqrt[3]{x-2}}
\sqrt[5]{x-3} = (x-3)^{0.2}
(x-2)^{1/2} = \sqrt{x-2}
(x-2)^(1/3) = ∛(x-2)
(x-2)^{4/3} = (x-2)\sqrt[3]{x-2}
x^{1/3}-2 # \sqrt[3]{x-2}
(-8)^{1/3} = -2
(-8)^{1/3} # 2
\sqrt[3]{-8} = -2
(-8)^{2/3} = 4
(x-5)^{3/2} = (x-5)\sqrt{x-5}
\sqrt[4]{x^2} # \sqrt[4]{x}
\sqrt[6]{8} = \sqrt{2}
-- unions of sets and intervals
\{1,2\}\cup\{3\} = \{1,2,3\}
\{1,2\}\cup\{3\} # \{1,2\}
\{1,2\}∪\{2,3\} = \{1,2,3\}
\{1\}\cup\{2\} = 1,2
\{(1,2)\}\cup\{(3,4)\} = \{(1,2),(3,4)\}
\{(1,2)\}\cup\{(2,3)\} # \{(1,3)\}
(1,2]\cup(2,3) = (1,3)
(1,2]\cup(2,3) # (1,3]
(1,2]\cup(2,3) # [1,3)
(1,2)\cup(2,3) # (1,3)
(1,2)\cup\{2\}\cup(2,3) = 1<x<3
[1,2]\cup[3,4] # [1,4]
(1,3)\cup(2,4) = (1,4)
(1,\sqrt{5}]\cup(\sqrt5,3) = (1,3)
(1,\sqrt{5})\cup(\sqrt5,3) # (1,3)
(3,4)\cup(1,2) = (1,2)\cup(3,4)
(1,2) U (3,4) = (1,2)\cup(3,4)
(1,2)\text{ or }(3,4) = (1,2)\cup(3,4)
(-1,1)\cup\{1\} = (-1,1]
(-1,1)\cup\{1\} = -1<x\le1
(-\infty,0)\cup(0,\infty) = \mathbb{R}\setminus\{0\}
(-\infty,0)\cup(0,\infty) # \mathbb{R}
(-\infty,0]\cup(0,\infty) = \mathbb{R}
\mathbb{R}\setminus\{1,2\} = (-\infty,1)\cup(1,2)\cup(2,\infty)
\mathbb{R}\setminus\{1,2\} # \mathbb{R}\setminus\{1\}
\{x \mid x\ne 1,2\} = x\ne1 \text{ and } x \ne 2
x\ne\pm1 = (-\infty,-1)\cup(-1,1)\cup(1,\infty)
\text{all real numbers except }0 = x\ne 0
除0外的所有实数 = x\ne0
[1,3]\cap[2,5] = [2,3]
[1,3]\cap[2,5] # [1,5]
x<2\text{ or }x=2 = x\le 2
\{x|x<1\}\cup\{x|x>2\} = x<1 \text{ or } x>2
-- matrices written otherwise
\left(\begin{array}{c}3\\4\end{array}\right) = \begin{pmatrix}3\\4\end{pmatrix}
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] = \begin{pmatrix}1&2\\3&4\end{pmatrix}
\left[\begin{array}{c|c}1&2\end{array}\right] = \begin{bmatrix}1&2\end{bmatrix}
\left(\begin{array}{c}4\\3\end{array}\right) # \begin{pmatrix}3\\4\end{pmatrix}
\left(\begin{array}{cc}3&4\end{array}\right) # \begin{pmatrix}3\\4\end{pmatrix}
\begin{array}{c}3\\4\end{array} = \begin{pmatrix}3\\4\end{pmatrix}
\left(\begin{smallmatrix}3\\4\end{smallmatrix}\right) = \begin{pmatrix}3\\4\end{pmatrix}
\left(\begin{matrix}3\\4\end{matrix}\right) = \begin{pmatrix}3\\4\end{pmatrix}
\begin{Bmatrix}3\\4\end{Bmatrix} = \begin{pmatrix}3\\4\end{pmatrix}
\begin{psmallmatrix}3\\4\end{psmallmatrix} = \begin{pmatrix}3\\4\end{pmatrix}
\pmatrix{3\cr 4} = \begin{pmatrix}3\\4\end{pmatrix}
\begin{pmatrix}3\\[2pt]4\end{pmatrix} = \begin{pmatrix}3\\4\end{pmatrix}
\begin{pmatrix}3&4\end{pmatrix}^T = \begin{pmatrix}3\\4\end{pmatrix}
\begin{pmatrix}3&4\end{pmatrix}^{\top} # \begin{pmatrix}3&4\end{pmatrix}
(3,4)^T = \begin{pmatrix}3\\4\end{pmatrix}
(3,4)^T # \begin{pmatrix}3&4\end{pmatrix}
[[1,2],[3,4]] = \begin{pmatrix}1&2\\3&4\end{pmatrix}
[[1,2],[3,4]] # \begin{pmatrix}1&3\\2&4\end{pmatrix}
\frac12\begin{pmatrix}2\\4\end{pmatrix} = \begin{pmatrix}1\\2\end{pmatrix}
-\begin{pmatrix}2\\4\end{pmatrix} # \begin{pmatrix}2\\4\end{pmatrix}
2\begin{pmatrix}1&0\\0&1\end{pmatrix} = \begin{pmatrix}2&0\\0&2\end{pmatrix}
\langle 3,4\rangle = \begin{pmatrix}3\\4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} # \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} = -2
\begin{cases}x=1\\y=2\end{cases} = (1,2)
\begin{cases}x=1\\y=2\end{cases} # (2,1)
\left\{\begin{array}{l}x=1\\y=2\end{array}\right. = x=1, y=2
-- families with an integer
x=k\pi\ (k\in\mathbb{Z}) = x=k\pi,\ k\in\mathbb{Z}
k\pi, k\in\mathbb{Z} = x=k\pi\ (k\in\mathbb{Z})
x=n\pi,\ n\in\mathbb{Z} = x=k\pi,\ k\in\mathbb{Z}
x=k\pi \text{ where } k \text{ is an integer} = x=k\pi,\ k\in\mathbb{Z}
x=k\pi,\ k\text{ any integer} = x=k\pi,\ k\in\mathbb{Z}
x=kπ（k为整数） = x=k\pi,\ k\in\mathbb{Z}
x=k\pi\quad(k\in \mathbf{Z}) = x=k\pi,\ k\in\mathbb{Z}
x=k\pi, k\in Z = x=k\pi,\ k\in\mathbb{Z}
x=k\pi \text{ for all } k\in\mathbb{Z} = x=k\pi,\ k\in\mathbb{Z}
x=k\pi, k=0,\pm1,\pm2,\ldots = x=k\pi,\ k\in\mathbb{Z}
\{x\mid x=k\pi,k\in\mathbb{Z}\} = x=k\pi,\ k\in\mathbb{Z}
\{k\pi : k\in\mathbb{Z}\} = x=k\pi,\ k\in\mathbb{Z}
x=2k\pi,\ k\in\mathbb{Z} # x=k\pi,\ k\in\mathbb{Z}
x=k\pi,\ k\in\mathbb{N} # x=k\pi,\ k\in\mathbb{Z}
x=k\pi # x=2k\pi,\ k\in\mathbb{Z}
x=\frac{\pi}{2}+k\pi,k\in\mathbb{Z} = x=k\pi-\frac{\pi}{2}\ (k\in\mathbb{Z})
x=(2k+1)\pi,k\in\mathbb{Z} = x=2n\pi-\pi, n\in\mathbb{Z}
x=(2k+1)\pi,k\in\mathbb{Z} # x=2k\pi, k\in\mathbb{Z}
x=\frac{\pi}{3}+k\pi,k\in\mathbb{Z} # x=k\pi-\frac{\pi}{3}\ (k\in\mathbb{Z})
x=2k\pi\pm\frac{\pi}{3},k\in\mathbb{Z} = x=\pm\frac{\pi}{3}+2k\pi\ (k\in\mathbb{Z})
[k\pi,k\pi+\frac{\pi}{2}](k\in\mathbb{Z}) = [n\pi,\frac{\pi}{2}+n\pi],n\in\mathbb{Z}
[k\pi,k\pi+\frac{\pi}{2}](k\in\mathbb{Z}) # (k\pi,k\pi+\frac{\pi}{2}),k\in\mathbb{Z}
(k\pi-\frac\pi2,k\pi),k\in\mathbb{Z} = (k\pi+\frac\pi2,k\pi+\pi),k\in\mathbb{Z}
k=5 # x=5k, k\in\mathbb{Z}
-- a root without braces
\sqrt57 # \sqrt{57}
\sqrt57 = 7\sqrt5
\sqrt 57 = 7\sqrt{5}
\sqrt2/2 = \frac{\sqrt2}{2}
\sqrt2x = x\sqrt{2}
\sqrt[3]57 # \sqrt[3]{57}
√57 = \sqrt{57}
√57 # 7\sqrt5
sqrt57 = \sqrt{57}
sqrt(57) = \sqrt{57}
3√57 = 3\sqrt{57}
\frac157 = \frac{7}{5}
\frac157 # \frac{1}{57}
\sqrt{57} # 57
-- decimals that go on
0.333\ldots = \frac13
0.333... = 1/3
0.333… = \frac13
0.333\dots = 1/3
0.333\cdots = 1/3
0.3333\ldots # 0.3333
0.333 # 1/3
0.333 \text{ repeating} = 1/3
0.1666\ldots = 1/6
0.1666\ldots # 1/7
0.142857142857\ldots = \frac17
0.1212\ldots = \frac{4}{33}
-2.666\ldots = -\frac83
0.999\ldots = 1
0.3\ldots # 0.4
0.(3) = 1/3
2.\dot{3} = 7/3
2.\dot{3} # 20.333
0.\dot{1}4285\dot{7} = \frac17
0.1\bar{6} = \frac16
0.\overline3 = 1/3
.\overline{3} = 1/3
2.718281828\ldots = e
2.718281828\ldots # 2.718281828
1.41421356\ldots = \sqrt2
1.41421356\ldots # \sqrt3
3.14159\ldots = \pi
3.14159\ldots # 3.14159
3.14\ldots # 3.14
0.5\ldots # 1/2
1,2,3,\ldots # 1,2,3
1,2,3,\ldots = 1, 2, 3, \ldots
-- spaces and commas in numbers
3, 141 # 3141
3, 141 = 3,\ 141
3,141 = 3141
3 141 = 3141
3，141 # 3141
3、141 # 3141
3 4 # 34
3 4 # 12
12 34 # 1234
1, 234, 567 # 1234567
(3, 141) = (3,141)
(3, 141) # 3141
3, 141 = \{3, 141\}
3,\!141 = 3141
3\,141 = 3141
100, 200 = 100,200
-- numbers and nothing in words
二十五 = 25
二十五 # 205
二百零五 = 205
两个 = 2
三十元 = 30
三角形 # 3
百分之二十五 = 25\%
三分之一 = \frac13
\text{twenty-five} = 25
\text{one hundred and five} = 105
\text{one hundred and five} # 100
\text{twenty-five} # 205
\text{no solution} = \emptyset
\text{no solution} = \text{No solutions}
无解 = \text{no real solutions}
无解 # 0
空集 = \varnothing
-- a chain of equations
b^a=3^5=243 = 243
b^a=3^5=243 # 3
x+y=y+z=5 # 5
a+b=5 # 5
-- combinations as Chinese textbooks write them
C_5^2 = 10
C_{10}^{3} = 120
C_5^2 # 20
\mathrm{A}_5^2 = 20
A_5^2 # 10
"""


def _pairs():
    kind, found = "", []
    for line in PAIRS.strip().splitlines():
        if line.startswith("-- "):
            kind = line[3:]
            continue
        one, sign, other = re.split(" ([=#]) ", line, maxsplit=1)
        found.append(pytest.param(one, sign == "=", other, id=f"{kind}: {line}"))
    return found


@pytest.mark.parametrize("one, same, other", _pairs())
def test_an_answer_of_each_kind(one, same, other):
    assert answers.equivalent(one, other) is same
    assert answers.equivalent(other, one) is same
