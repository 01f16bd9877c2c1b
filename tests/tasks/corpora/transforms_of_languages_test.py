"""Named transforms of source in languages other than Python, by tree-sitter's grammars."""

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.transformed import AGAIN_THE_SAME, OF_PYTHON, apply, dedent

JAVASCRIPT = dedent('''
    #!/usr/bin/env node
    // top
    import {a as q} from "m"; /* b */
    const {x, y: z} = o, re = /\\/\\//;
    function add(left, ...rest) { let sum = left.q; /* c
      d */ return `a ${sum /* e */} // no` + sum + rest; }
    class A { move(by) { return {by, to: by - 1}; } }
    for (const i of z) add(i, "// no", re);
''')
JAVA = dedent('''
    package a.b;
    import java.util.List;
    /** Doc. */
    class A extends B {
      private int size; // field
      @Override int run(int by, List<String> xs) {
        this.size += by; /* no line */ int n = xs.size();
        for (String x : xs) n += x.length() + "/* no */".length();
        return run(n, xs);
      }
    }
''')
C = dedent('''
    /* licence */
    #include <stdio.h>
    #define TWICE(a) ((a) + (a)) /* twice */
    // one \\
       goes on
    int outside(int there);
    static int total(int count, char *names[3]) { // sum
      int i, sum = 0;
      for (i = 0; i < count; i++) sum += TWICE(i)/*x*/+count;
      printf("// no %d", sum, outside(1));
      return sum;
    }
    int main(void) { struct s p; p.sum2 = total(3, 0); return p.sum2; }
''')
GO = dedent('''
    // Package
    package main

    import "path"

    type P struct{ X int } // point

    func (p *P) Move(dx, dy int) (r int) {
    \tx := P{X: 1}
    \tfor i, v := range []int{1, 2} {
    \t\tprintln(i, v, x.X, path.Base("// no"))
    \t}
    \tvar q = 1 /* c */
    \treturn q + dx
    }
''')
SOURCES = {"javascript": JAVASCRIPT, "java": JAVA, "c": C, "go": GO}


def test_other_languages_without_comments(tree_sitter: None) -> None:
    assert apply(JAVASCRIPT, "strip_comments", language="javascript") == dedent('''
        #!/usr/bin/env node
        import {a as q} from "m";
        const {x, y: z} = o, re = /\\/\\//;
        function add(left, ...rest) { let sum = left.q; @ return `a ${sum  } // no` + sum + rest; }
        class A { move(by) { return {by, to: by - 1}; } }
        for (const i of z) add(i, "// no", re);
    ''').replace("@", "\n")
    assert apply(C, "strip_comments", language="c") == dedent('''
        #include <stdio.h>
        #define TWICE(a) ((a) + (a))
        int outside(int there);
        static int total(int count, char *names[3]) {
          int i, sum = 0;
          for (i = 0; i < count; i++) sum += TWICE(i) +count;
          printf("// no %d", sum, outside(1));
          return sum;
        }
        int main(void) { struct s p; p.sum2 = total(3, 0); return p.sum2; }
    ''')
    assert apply("return\n/* a */ 3\n", "strip_comments", language="javascript") == "return\n  3\n"
    assert apply("int a; // b\r\n// c\r\nint d;\r\n", "strip_comments", language="c") == "int a;\r\nint d;\r\n"


def test_other_languages_comments_alone(tree_sitter: None) -> None:
    assert apply(JAVASCRIPT, "comments_only", language="javascript") == "// top\n/* b */\n/* c\n  d */\n/* e */\n"
    assert apply(JAVA, "comments_only", language="java") == "/** Doc. */\n// field\n/* no line */\n"
    assert apply(GO, "comments_only", language="go") == "// Package\n// point\n/* c */\n"
    assert apply(C, "comments_only", language="c") == (
        "/* licence */\n/* twice */\n// one \\\n   goes on\n// sum\n/*x*/\n")


def test_other_languages_renamed(tree_sitter: None) -> None:
    assert apply(JAVASCRIPT, "strip_comments", "rename_identifiers", language="javascript") == dedent('''
        #!/usr/bin/env node
        import {a as q} from "m";
        const {x, y: v0} = o, v1 = /\\/\\//;
        function v2(v3, ...v4) { let v5 = v3.q; @ return `a ${v5  } // no` + v5 + v4; }
        class v6 { move(by) { return {by, to: by - 1}; } }
        for (const v7 of v0) v2(v7, "// no", v1);
    ''').replace("@", "\n")
    assert apply(JAVA, "strip_comments", "rename_identifiers", language="java") == dedent('''
        package a.b;
        import java.util.List;
        class v0 extends B {
          private int size;
          @Override int run(int v1, List<String> v2) {
            this.size += v1;   int v3 = v2.size();
            for (String v4 : v2) v3 += v4.length() + "/* no */".length();
            return run(v3, v2);
          }
        }
    ''')
    assert apply(C, "strip_comments", "rename_identifiers", language="c") == dedent('''
        #include <stdio.h>
        #define v0(a) ((a) + (a))
        int outside(int v1);
        static int v2(int v3, char *v4[3]) {
          int v5, v6 = 0;
          for (v5 = 0; v5 < v3; v5++) v6 += v0(v5) +v3;
          printf("// no %d", v6, outside(1));
          return v6;
        }
        int main(void) { struct s v7; v7.sum2 = v2(3, 0); return v7.sum2; }
    ''')
    assert apply(GO, "strip_comments", "rename_identifiers", language="go") == dedent('''
        package main

        import "path"

        type P struct{ X int }

        func (v0 *P) Move(v1, v2 int) (v3 int) {
        \tv4 := P{X: 1}
        \tfor v5, v6 := range []int{1, 2} {
        \t\tprintln(v5, v6, v4.X, path.Base("// no"))
        \t}
        \tvar v7 = 1
        \treturn v7 + v1
        }
    ''')


@pytest.mark.parametrize("language", SOURCES)
def test_a_second_time_changes_nothing_in_other_languages(tree_sitter: None, language: str) -> None:
    for source in (SOURCES[language], SOURCES[language].replace("\n", "\r\n")):
        for name in AGAIN_THE_SAME:
            once = apply(source, name, language=language)
            assert isinstance(once, str) and apply(once, name, language=language) == once
    names = apply(SOURCES[language], "rename_identifiers_randomly", language=language)
    assert names == apply(SOURCES[language], "rename_identifiers_randomly", language=language) != SOURCES[language]


def test_pseudocode_of_other_languages(tree_sitter: None) -> None:
    assert apply("int f(int *a) {\n  // b\n  return a[0] == 1 && !a;\n}\n", "pseudocode", language="c") == (
        "int f ( int * a ) {\n  // b\n  give back a [ 0 ] is equal to 1 and not a ;\n}\n")


@hypothesis.settings(max_examples=200, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(language=st.sampled_from(sorted(SOURCES)), pieces=st.lists(st.sampled_from([
    "int a;", "var b = 1;", "/*c*/", "// d\n", "/* e\n f */", "\n", " ", "{", "}", "(", ")", "\\\n", 
    "#define X 1 /* y */\n", '"s"', "class A {", "function f(x) {", "func g(y int) {", "package p\n",
    "é", "\0", "return a", "`t${", "\r\n", "<!-- h -->\n"]),
                                max_size=12))
def test_made_up_sources_of_other_languages(tree_sitter: None, language: str, pieces: list[str]) -> None:
    for name in OF_PYTHON[:5]:
        result = apply("".join(pieces), name, language=language)
        if isinstance(result, str) and name in AGAIN_THE_SAME:
            assert apply(result, name, language=language) == result
